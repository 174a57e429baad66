"""Which requests reach the page: an ASGI middleware before Gradio, and what it bounds.

Gradio serves whoever finds its port, under any name, with routes that this page
does not use. Here everything is refused that the page does not need.
"""

import asyncio
import ipaddress
import json
import shutil
import socket
import time
from collections import OrderedDict
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .uploads import stored
from .viewer import FETCH

MOST_UPLOADED = 4 << 30  # bytes of one request with files
MOST_STORED = 8 << 30  # bytes of all uploads that wait to be read
LEAST_FREE = 1 << 30  # bytes that uploads leave free on the disk
MOST_SAID = 4 << 20  # bytes of any other request
SILENCE_S = 30  # in which some of a request must come
SLOWEST = 4096  # bytes a second, after the first `SILENCE_S`
FAILURES, FORGIVEN_S = 5, 300  # failed logins of one address, and after how long they are forgotten
_LONGEST_NAME = 100  # of a session
_LONGEST_PATH = 250  # bytes; of a longer name, Gradio asks the file system in vain
_API = "/gradio_api/"
_UPLOAD = _API + "upload"
_PATHS = {
    *(
        "/",
        "/config",
        "/login",
        "/logout",
        "/theme.css",
        "/favicon.ico",
        "/manifest.json",
        "/robots.txt",
        _UPLOAD,
        FETCH,
    ),
    *(_API + name for name in "info user login_check app_id startup-events theme.css upload_progress".split()),
    *(_API + name for name in "queue/join queue/data queue/status run/predict cancel reset mcp".split()),
}
_CALLS = (_API + "run/predict", _API + "queue/join")  # which name a function by its number
_FOLDERS = ("/static/", "/assets/", "/svelte/", _API + "heartbeat/", _API + "call/", _API + "mcp/")
_HEADERS = {
    # Gradio's scripts are inline and use eval; nothing may come from, or go to, another place.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Refusal(Exception):
    """A request that goes no further.

    Args:
        status: of HTTP.
        sentence: why, and what to do.
    """

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Gate:
    """The middleware.

    Args:
        app: what is behind it.
        folder: where uploads are stored.
        host: name or address on which the server listens.
        names: by which browsers may call it, beside `host`, localhost, this machine's name and any IP address.
    """

    def __init__(self, app: ASGIApp, folder: str | Path, host: str = "", names: tuple[str, ...] = ()):
        self.app, self.folder = app, Path(folder)
        self.proxies = {(name.lower(), None) for name in names}  # one may ask under another name than its pages have
        self.names = {"localhost", socket.gethostname().lower(), host.lower(), *(name for name, _ in self.proxies)}
        self.names.discard("")
        self._arriving = 0  # bytes of uploads that are under way
        self._failures: OrderedDict[str, list[float]] = OrderedDict()  # address: when its logins failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        path, length = scope["path"].rstrip("/") or "/", 0

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
                if path == "/login" and message["status"] == 400:
                    self._failures.setdefault(_address(scope), []).append(time.monotonic())
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_origin(headers, path)
            if path not in _PATHS and not path.startswith(_FOLDERS) or len(path.encode()) > _LONGEST_PATH:
                raise Refusal(404, "There is nothing here.")
            length = self._check_length(headers, path)
            if path == "/login":
                self._check_login(_address(scope))
        except Refusal as refusal:
            return await PlainTextResponse(str(refusal), refusal.status)(scope, receive, answer)
        receive = _paced(receive, path == _UPLOAD) if length else receive
        uploaded = length if path == _UPLOAD else 0
        self._arriving += uploaded
        try:
            if scope["method"] == "POST" and path.startswith(_API) and not path.startswith((_UPLOAD, _API + "mcp")):
                receive = await _checked(receive, headers, scope)
            await self.app(scope, receive, answer)
        except Refusal as refusal:
            await PlainTextResponse(str(refusal), refusal.status)(scope, receive, answer)
        except TypeError:  # what Gradio makes of a form's field that is no file
            if path != _UPLOAD:
                raise
            await PlainTextResponse("A part of the form is no file; send files alone.", 400)(scope, receive, answer)
        finally:
            self._arriving -= uploaded

    def _check_origin(self, headers: Headers, path: str) -> None:
        """Refuse names under which another site's pages could read the answers, and requests of such pages."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name(f"//{host}")
        if not (_is_address(name) or name in self.names):
            raise Refusal(421, "This server does not go by that name; start it with --name if it should.")
        if origin is not None and _place(origin) not in {_place(f"//{host}"), *self.proxies}:
            raise Refusal(403, "Pages of other sites may not use this server.")
        followed = path == "/" and headers.get("sec-fetch-mode") == "navigate"  # a link to the page
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not followed:
            raise Refusal(403, "Pages of other sites may not use this server.")

    def _check_length(self, headers: Headers, path: str) -> int:
        """The length of a request's body, once it is known and there is room for it."""
        if "transfer-encoding" in headers:
            raise Refusal(411, "Say how long the request is, in a Content-Length.")
        length = int(headers.get("content-length") or 0)
        most = MOST_UPLOADED if path == _UPLOAD else MOST_SAID
        if length > most:
            raise Refusal(413, f"At most {most >> 20} MB are taken at once; send fewer files.")
        if path == _UPLOAD:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free - LEAST_FREE
            if self._arriving + length > min(free, MOST_STORED - stored(self.folder)):
                raise Refusal(507, "There is no room for more uploads now; try again in some minutes.")
        return length

    def _check_login(self, address: str) -> None:
        since = time.monotonic() - FORGIVEN_S
        recent = [moment for moment in self._failures.pop(address, []) if moment > since]
        if recent:
            self._failures[address] = recent
        while len(self._failures) > 10_000:
            self._failures.popitem(last=False)
        if len(recent) >= FAILURES:
            raise Refusal(429, f"Too many failed logins; try again in {FORGIVEN_S // 60} minutes.")


def _name(url: str) -> str:
    """The host of an address, in small letters; "" if there is none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _place(url: str) -> tuple[str, int | None]:
    """Host and port of an address, no port for those that http and https use of themselves."""
    try:
        port = urlsplit(url).port
    except ValueError:
        return "", -1
    return _name(url), None if port in (80, 443) else port


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _address(scope: Scope) -> str:
    """Who asks: an IPv4 address, or the network of an IPv6 address, which is one household's."""
    host = (scope.get("client") or ("", 0))[0]
    if not _is_address(host):
        return host
    address = ipaddress.ip_address(host)
    return host if address.version == 4 else str(ipaddress.ip_network(f"{host.split('%')[0]}/64", strict=False))


def _paced(receive: Receive, upload: bool) -> Receive:
    """`receive` that ends a request that stops or hardly moves.

    Of an upload that ends early, Gradio would leave what has come on the disk; it deletes it if told that the form
    is wrong.
    """
    start, received, done = time.monotonic(), 0, False

    async def next_message() -> Message:
        nonlocal received, done
        if done:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), SILENCE_S)
        except TimeoutError:
            message = {"type": "http.disconnect"}
        received += len(message.get("body", b""))
        seconds = time.monotonic() - start
        if seconds > SILENCE_S and received / seconds < SLOWEST:
            message = {"type": "http.disconnect"}
        done = not message.get("more_body", False)
        if message["type"] == "http.disconnect" and upload:
            raise MultiPartException("The upload ended before it was complete; send it again.")
        return message

    return next_message


async def _checked(receive: Receive, headers: Headers, scope: Scope) -> Receive:
    """`receive` once more, of a request to an endpoint that is whole and of the shape that Gradio expects.

    Of other text than JSON it fails to quote the fault; and one empty name of a session, which it stores under another
    name than it looks for, makes it fail for everybody who asks until that request has had its turn. It also fails at
    functions that it does not have, and at those that get fewer or more values than they take.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "Send JSON, and say so: Content-Type: application/json.")
    body, message = bytearray(), {"more_body": True}
    while message.get("more_body", False):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(408, "The request ended before it was complete; send it again.")
        body += message.get("body", b"")
    try:
        asked = json.loads(bytes(body))
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise Refusal(400, "This is no JSON object; see view_api() of gradio_client for what to send.")
    session = asked.get("session_hash")
    if session is not None and not (isinstance(session, str) and 0 < len(session) <= _LONGEST_NAME):
        raise Refusal(400, "The name of the session is empty or too long; leave it out.")
    if scope["path"].rstrip("/") in _CALLS:
        _check_function(asked, scope)
    whole = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

    async def again() -> Message:
        return next(whole, None) or await receive()

    return again


def _check_function(asked: dict, scope: Scope) -> None:
    number, data = asked.get("fn_index"), asked.get("data")
    function = scope["app"].get_blocks().fns.get(number) if isinstance(number, int) else None
    if function is None or function.fn is None:
        raise Refusal(404, "There is no such function; see view_api() of gradio_client for those there are.")
    direct = scope["path"].startswith(_CALLS[0])  # as pages call it; of others, Gradio itself fills up what is missing
    if direct and isinstance(data, list) and len(data) != len(function.inputs):
        raise Refusal(400, f"The function takes {len(function.inputs)} values.")


def patient(protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP `protocol`, which hangs up when a request's header takes longer than `SILENCE_S`."""

    class Patient(protocol):
        """Watches a connection from its first byte, and after each request, until the next request is whole."""

        _watching = False

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            if not self._watching and not self._busy():
                self._watching = True
                self.loop.call_later(SILENCE_S, self._look, self.cycle)

        def _busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _look(self, last: object) -> None:
            self._watching = False
            if self.cycle is last and not self._busy():
                self.transport.close()
            elif not self.transport.is_closing():
                self._watch()

    return Patient
