"""Hostile requests: whatever is asked, the page goes on, tells nothing of its machine and keeps nothing on the disk."""

import argparse
import http.client
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
LONGEST_S = 10
_TRAVERSALS = (
    "/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd", "..%2f..%2f..%2fetc%2fpasswd",
    "....//....//etc/passwd", "http://127.0.0.1:22/", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd",
    "//example.org/x", "\\\\host\\share", "app.py", "ui/server.py", "x%00.png", "a" * 3000, "<script>", "=1+1",
)  # fmt: skip
_ROUTES = (
    "/", "/config", "/login", "/logout", "/static/", "/assets/", "/svelte/", "/custom_component/", "/monitoring/",
    "/gradio_api/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/gradio_api/stream/", "/gradio_api/upload",
    "/gradio_api/component_server", "/gradio_api/process_recording", "/gradio_api/vibe-edit/", "/gradio_api/vibe-code",
    "/gradio_api/dev/reload", "/gradio_api/run/analyze", "/gradio_api/run/predict", "/gradio_api/queue/join",
    "/gradio_api/call/analyze", "/gradio_api/call/batch", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/info",
    "/gradio_api/token", "/gradio_api/deep_link", "/gradio_api/runs",
)  # fmt: skip
_OPEN = tuple(f"/gradio_api/{name}" for name in "upload run/predict queue/join call/analyze call/batch".split())
_VALUES = (None, True, -1, 1e308, "", "x", [], {}, [[]], {"path": None}, {"__type__": "update"}, 2**70)


def hostile(chance: random.Random, port: int) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers) of one request."""
    path = chance.choice(_ROUTES + _OPEN * 3)
    if path not in _OPEN and chance.random() < 0.4:
        path += chance.choice(("", "/")) + chance.choice(_TRAVERSALS)
    headers = {"Host": chance.choice((f"127.0.0.1:{port}",) * 40 + ("evil.example", "localhost.evil.example", "[::1"))}
    if chance.random() < 0.1:
        origins = (f"http://127.0.0.1:{port}", "http://evil.example", "null", "http://127.0.0.1:1", "http://[")
        headers["Origin"] = chance.choice(origins)
    if chance.random() < 0.2:
        headers["X-Forwarded-Host"] = headers["X-Forwarded-Proto"] = chance.choice(_TRAVERSALS)
    method = chance.choice(("GET", "POST", "POST", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
    if method != "POST":
        return method, path, b"", headers
    if "upload" in path or chance.random() < 0.2:
        return method, path, _form(chance, headers), headers
    headers["Content-Type"] = chance.choice(
        ("application/json",) * 5 + ("text/plain", "application/x-www-form-urlencoded")
    )
    return method, path, _json(chance), headers


def _json(chance: random.Random) -> bytes:
    file = {"path": chance.choice(_TRAVERSALS), "url": chance.choice(_TRAVERSALS), "meta": {"_type": "gradio.FileData"}}
    data = chance.choice(([file], [[file]], [*_VALUES], [chance.choice(_VALUES)] * chance.randrange(30), [file] * 9))
    body = {"data": data, "session_hash": chance.choice(("x", "", None, "../x")), "event_id": chance.choice(_VALUES)}
    if chance.random() < 0.7:
        body |= {"fn_index": chance.choice((*range(30), -1, 999, "0")), "trigger_id": chance.choice(_VALUES)}
    text = json.dumps(body).encode()
    fault = chance.randrange(6)
    if fault == 0:
        return text[: chance.randrange(len(text))]
    if fault == 1:
        return b"[" * chance.choice((10, 5000, 200_000))
    return text


def _form(chance: random.Random, headers: dict[str, str]) -> bytes:
    headers["Content-Type"] = chance.choice(("multipart/form-data; boundary=x",) * 6 + ("multipart/form-data", "x/y"))
    parts = b""
    for _ in range(chance.randrange(4)):
        name = chance.choice((*_TRAVERSALS, "film.png", ".", "..", "", "a\x01b", "CON", "x" * 300)).encode()
        field = chance.choice((b"files", b"files", b"other", b""))
        kind = b'; filename="' + name + b'"' if chance.random() < 0.8 else b""
        parts += b'--x\r\nContent-Disposition: form-data; name="' + field + b'"' + kind + b"\r\n\r\n"
        parts += chance.randbytes(chance.choice((0, 10, 5000))) + b"\r\n"
    return parts + chance.choice((b"--x--\r\n", b"--x--\r\n", b"--x", b""))


def send(url: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """(status, the first megabyte of the answer) of one request; an answer that streams is read until it pauses."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=LONGEST_S)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value.encode("latin-1", "replace"))
        if body:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        streams = "event-stream" in (answer.headers.get("content-type") or "")
        return answer.status, b"" if streams else answer.read(1 << 20)
    except (http.client.BadStatusLine, http.client.RemoteDisconnected, ConnectionError):
        return 0, b""  # the server hung up
    except http.client.InvalidURL:
        return -1, b""  # never sent
    finally:
        connection.close()


def campaign(url: str, count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """How many of `count` requests had which status (0: hung up), and what is wrong."""
    statuses, wrong, port = Counter(), [], urlsplit(url).port
    for number in range(count):
        request = hostile(random.Random(f"{seed} {number}"), port)
        try:
            status, text = send(url, *request)
        except TimeoutError:
            wrong.append(f"{number}: no answer in {LONGEST_S} s to {request[0]} {request[1][:80]}")
            continue
        statuses[status] += 1
        if status == 500:
            wrong.append(f"{number}: failed: {request[0]} {request[1][:80]} {request[2][:200]!r}")
        if re.search(rb"root:.*:0:0|Traceback|def main\(|site-packages", text):
            wrong.append(f"{number}: tells of its machine: {request[0]} {request[1][:80]}")
    status, _ = send(url, "GET", "/", b"", {"Host": f"127.0.0.1:{port}"})
    if status != 200:
        wrong.append("the page does not answer any more")
    return statuses, wrong


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m tests.campaign requests`."""
    parser.add_argument("--count", type=int, default=2000, help="requests to send (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from gradio_client import Client
    from serving import process_at, served

    with (
        tempfile.TemporaryDirectory() as folder,
        served(ROOT / "weights", Path(folder), hostile=True) as (url, uploads),
    ):
        page = process_at(url)
        Client(url, verbose=False).predict(api_name="/models")  # which loads the networks
        before, begun = page.memory_info().rss, time.monotonic()
        statuses, wrong = campaign(url, args.count, args.seed)
        seconds, grown = time.monotonic() - begun, page.memory_info().rss - before
        left = sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file())
    print("| status | answers |\n|---|---|")
    for status, number in sorted(statuses.items()):
        print(f"| {status or 'hung up'} | {number} |")
    print(
        f"\n{args.count} requests in {seconds:.0f} s; memory grew by {grown >> 20} MB; {left >> 10} KB of uploads wait"
    )
    print(*wrong, sep="\n")
    return 1 if wrong else 0
