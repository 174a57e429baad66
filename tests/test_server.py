"""The server against hostile requests, files and surroundings."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import campaign_files
import campaign_requests
import pytest
import uvicorn
from conftest import ROOT, WAIT_S, hangs_up, served, wait_until
from serving import process_at
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from test_app import _files

from manet_core.weights import read_manifest, write_manifest
from ui import gate, networks
from ui.benchmark import load
from ui.gate import Gate, patient
from ui.networks import Networks
from ui.uploads import stored, sweep

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and limits of POSIX")


# The page


@pytest.fixture(scope="module")
def server(random_weights, tmp_path_factory):
    with served(random_weights, tmp_path_factory.mktemp("server"), hostile=True) as url_and_uploads:
        yield url_and_uploads


@pytest.fixture(scope="module")
def ask(server):
    """Send a request to the page; (status, answer)."""

    def send(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        host = {"Host": urlsplit(server[0]).netloc}
        return campaign_requests.send(server[0], method, path, body, host | headers)

    return send


@pytest.fixture(scope="module")
def call(server, ask):
    """Call an endpoint as curl would, and return the text of its answer."""

    def send(name: str, data: list) -> str:
        kind = {"Content_Type": "application/json"}
        status, answer = ask("POST", f"/gradio_api/call/{name}", json.dumps({"data": data}).encode(), **kind)
        assert status == 200, answer
        connection = http.client.HTTPConnection(urlsplit(server[0]).netloc, timeout=WAIT_S)
        with closing(connection):
            connection.request("GET", f"/gradio_api/call/{name}/{json.loads(answer)['event_id']}")
            return connection.getresponse().read().decode()

    return send


def _upload(ask, name: str, data: bytes) -> tuple[int, bytes]:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    kind = {"Content_Type": "multipart/form-data; boundary=x"}
    return ask("POST", "/gradio_api/upload", head + data + b"\r\n--x--\r\n", **kind)


def test_other_names_and_other_sites_are_refused(server, ask):
    port = urlsplit(server[0]).port
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", ""):
        assert ask("GET", "/", Host=host)[0] == 421
    for host in (f"localhost:{port}", f"[::1]:{port}", f"{socket.gethostname()}:{port}"):
        assert ask("GET", "/", Host=host)[0] == 200
    join = ("POST", "/gradio_api/queue/join", b'{"fn_index": 0}')
    kind = {"Content_Type": "application/json"}
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}", "http://["):
        assert ask(*join, Origin=origin, **kind)[0] == 403
    assert ask(*join, Origin=f"http://127.0.0.1:{port}", **kind)[0] == 422  # it is no proper request, but it was let in
    assert ask("GET", "/gradio_api/info", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


def test_a_call_of_no_function_is_refused_and_junk_is_no_failure(ask):
    """Before Gradio fails at it; the page's own functions take what comes."""
    kind = {"Content_Type": "application/json"}

    def call(name: str, **body: object) -> int:
        return ask("POST", f"/gradio_api/{name}", json.dumps({"session_hash": "x"} | body).encode(), **kind)[0]

    for name in ("run/predict", "queue/join"):
        for number in (
            {},
            {"fn_index": 999},
            {"fn_index": -1},
            {"fn_index": "0"},
            {"fn_index": None},
            {"fn_index": []},
        ):
            assert call(name, data=[None], **number) == 404
    functions = [f for f in json.loads(ask("GET", "/config")[1])["dependencies"] if not f["queue"]]
    assert len(functions) > 10
    for function in functions:
        number, count = function["id"], len(function["inputs"])
        assert call("run/predict", fn_index=number, data=[None] * (count + 1)) in (400, 404)
        for value in (None, True, "x", {"path": "/etc/passwd"}):
            for event in (None, {}, 5):
                assert call("run/predict", fn_index=number, data=[value] * count, event_data=event) in (200, 404)
    for folder in ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/"):
        assert ask("GET", folder + 300 * "a")[0] == 404


@pytest.mark.parametrize(
    "path",
    ["file=/etc/passwd", "proxy=http://127.0.0.1/", "component_server", "process_recording", "vibe-code", "token"],
)
def test_what_the_page_does_not_need_is_not_there(ask, path):
    for method in ("GET", "POST"):
        assert ask(method, f"/gradio_api/{path}", b"{}" if method == "POST" else b"")[0] == 404


def test_nothing_but_an_upload_is_read(server, ask, call, picture):
    """Neither files of the machine, nor other addresses, nor what another user sent by its address on this server."""
    asked = []

    class Inner(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Inner) as inner:
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{inner.server_port}/x.png"
        for path in (str(picture), "/etc/passwd", str(server[1] / ".." / "x"), address, "http://example.org/x.png"):
            for name in ("analyze", "batch"):
                file = {"path": path, "url": address, "meta": {"_type": "gradio.FileData"}}
                answer = call(name, [file] if name == "analyze" else [[file]])
                assert "readings" not in answer and "root:" not in answer
                assert "not an upload" in answer or "fetches nothing" in answer or "event: error" in answer, answer
        inner.shutdown()
    assert not asked and picture.is_file()
    status, answer = _upload(ask, "secret.png", picture.read_bytes())
    (path,) = json.loads(answer)
    assert status == 200 and Path(path).is_relative_to(server[1])
    assert ask("GET", f"/gradio_api/file={path}")[0] == 404
    assert "readings" in call("analyze", [{"path": path, "meta": {"_type": "gradio.FileData"}}])
    assert not _files(server[1])


def test_the_same_file_sent_twice_is_two_files(server, ask, call, picture):
    """Or the first who reads it would delete it for the second."""
    paths = [json.loads(_upload(ask, "same.png", picture.read_bytes())[1])[0] for _ in range(2)]
    assert len(set(paths)) == 2 and {Path(path).name for path in paths} == {"same.png"}
    assert all(Path(path).read_bytes() == picture.read_bytes() for path in paths)
    for left, path in enumerate(reversed(paths)):
        assert len(_files(server[1])) == 2 - left
        assert "readings" in call("analyze", [{"path": path, "meta": {"_type": "gradio.FileData"}}])
    assert not _files(server[1])


@pytest.mark.parametrize("name", ["../../evil.png", "<img src=x onerror=alert(1)>.png", "=cmd|' /C calc'!A0.png", ".."])
def test_a_file_name_leads_nowhere(server, ask, call, picture, name):
    status, answer = _upload(ask, name, picture.read_bytes())
    if status == 200:
        (path,) = json.loads(answer)
        assert Path(path).resolve().is_relative_to(server[1])
        assert "readings" in call("analyze", [{"path": path, "meta": {"_type": "gradio.FileData"}}])
    else:
        assert status == 400
        sweep(server[1], -1)
    assert not _files(server[1])


def test_uploads_are_bounded_and_leave_nothing(server, ask):
    url, uploads = server
    assert ask("POST", "/gradio_api/queue/join", b"[" * (5 << 20))[0] in (413, 0)
    kind = {"Content_Type": "multipart/form-data; boundary=x"}
    assert ask("POST", "/gradio_api/upload", b"", Content_Length=str(5 << 30), **kind)[0] == 413
    assert ask("POST", "/gradio_api/upload", b"", Transfer_Encoding="chunked", **kind)[0] == 411
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port)) as cut_short:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 9999999\r\n"
        head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        head += '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        cut_short.sendall(head.encode() + bytes(200_000))
        wait_until(lambda: _files(uploads))
    wait_until(lambda: not _files(uploads))


def test_requests_of_no_shape_do_not_reach_gradio(ask):
    def join(body: bytes, kind: str = "application/json") -> int:
        return ask("POST", "/gradio_api/call/models", body, Content_Type=kind)[0]

    assert join(b'{"data": []}') == join(b'{"data": []}', "Application/JSON; charset=utf-8") == 200
    assert join(b'{"data": []}', "text/plain") == join(b"--x\r\n\x9b", "multipart/form-data; boundary=x") == 415
    for body in (b"", b"\x9b", b'{"data": []', b"[" * 200_000, b"[]", b"null"):
        assert join(body) == 400
    for session in (b'""', b"7", b"[]", b'"' + b"x" * 101 + b'"'):
        assert join(b'{"data": [], "session_hash": ' + session + b"}") == 400
    assert _upload(ask, "a.png", b"")[0] == 200
    head = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nno file\r\n--x--\r\n'
    kind = {"Content_Type": "multipart/form-data; boundary=x"}
    assert ask("POST", "/gradio_api/upload", head, **kind)[0] == 400


def test_readers_beside_an_archive_get_their_own_answers(server, tmp_path):
    found = load(server[0], process_at(server[0]).pid, tmp_path, users=3, seconds=5, files=20, pause=0.2)
    assert found["errors"] == found["wrong or mixed-up answers"] == 0, found
    assert found["answers"] >= 6 and found["X-rays of the archive read meanwhile"].endswith(" of 20")
    assert 0 < found["wait, median, s"] <= found["wait, 95th percentile, s"] <= found["longest wait, s"]
    sweep(server[1], -1)


def test_an_archive_lets_single_films_go_first_and_still_goes_on(monkeypatch):
    monkeypatch.setattr(networks, "LONGEST_S", 0.6)
    order, asked = [], Networks("nowhere")

    class Slow:
        def analyze(self, x):
            time.sleep(0.05)
            order.append(x)

        def analyze_many(self, xrays):
            return [self.analyze(read()) for read in xrays]

    asked._pipeline = Slow()

    def archive() -> None:
        asked.get().analyze_many([asked.patiently(lambda number=number: f"archive {number}") for number in range(4)])

    def reader() -> None:
        for number in range(20):
            asked.analyze(f"film {number}")
            time.sleep(0.02)  # the queue's moment between two

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(reader), (time.sleep(0.02), pool.submit(archive))[1]]
        [job.result() for job in jobs]
    assert sorted(order) == sorted([*(f"film {n}" for n in range(20)), *(f"archive {n}" for n in range(4))])
    assert order.index("archive 0") >= 5 and order.index("film 19") < order.index("archive 3")
    assert order.index("archive 0") < order.index("film 19"), "it never had a turn"


def test_hostile_requests_harm_nobody(server):
    statuses, wrong = campaign_requests.campaign(server[0], 60)
    assert not wrong and statuses.total() == 60 and 500 not in statuses
    sweep(server[1], -1)


# Bounds that take time, on a small application behind the same gate


@contextmanager
def behind_the_gate(folder: Path, **options):
    """(host, port) of an application that says how long its request was."""

    async def app(scope, receive, send):
        await PlainTextResponse(str(len(await Request(scope, receive).body())))(scope, receive, send)

    config = uvicorn.Config(Gate(app, folder, **options), port=0, log_level="critical", lifespan="off")
    config.load()
    config.http_protocol_class = patient(config.http_protocol_class)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_until(lambda: running.started)
    try:
        yield running.servers[0].sockets[0].getsockname()
    finally:
        running.should_exit = True
        thread.join(WAIT_S)


def test_slow_clients_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "SILENCE_S", 0.3)
    monkeypatch.setattr(gate, "SLOWEST", 10_000)
    head = b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000\r\n"
    with behind_the_gate(tmp_path) as address:
        for begun in (b"", head, head + b"\r\n" + b"x" * 10):
            with socket.create_connection(address) as silent:
                silent.sendall(begun)
                assert hangs_up(silent)
        with socket.create_connection(address) as trickling:
            trickling.sendall(head + b"\r\n")
            with pytest.raises(OSError):  # what was hung up takes no more
                for _ in range(200):
                    trickling.sendall(b"x")
                    time.sleep(0.05)
        with socket.create_connection(address) as proper:
            proper.sendall(head + b"\r\n" + b"x" * 5000)
            assert b"200 OK" in proper.recv(4096)


def test_names_that_were_given_are_let_in(tmp_path):
    with behind_the_gate(tmp_path, names=("manet.hospital.example",)) as (host, port):
        for name, origin, status in (
            ("manet.hospital.example", "https://manet.hospital.example", 200),
            ("MANet.Hospital.example:80", "http://manet.hospital.example", 200),
            ("127.0.0.1:9", "https://manet.hospital.example", 200),  # a proxy that does not hand on the name
            ("hospital.example", "https://manet.hospital.example", 421),
            ("manet.hospital.example", "https://hospital.example", 403),
        ):
            headers = {"Host": name, "Origin": origin}
            assert campaign_requests.send(f"http://{host}:{port}", "GET", "/", b"", headers)[0] == status


def test_a_full_disk_takes_no_uploads(tmp_path, monkeypatch):
    (tmp_path / "upload").write_bytes(bytes(1000))
    monkeypatch.setattr(gate, "MOST_STORED", 3000)
    with behind_the_gate(tmp_path) as (host, port):
        upload = (f"http://{host}:{port}", "POST", "/gradio_api/upload")
        assert campaign_requests.send(*upload, bytes(1500), {"Host": host}) == (200, b"1500")
        assert campaign_requests.send(*upload, bytes(2500), {"Host": host})[0] == 507
        monkeypatch.setattr(gate, "LEAST_FREE", 1 << 60)
        assert campaign_requests.send(*upload, bytes(10), {"Host": host})[0] == 507


def test_what_nobody_reads_is_swept(tmp_path):
    for age in (0, 1000):
        path = tmp_path / str(age) / "film.png"
        path.parent.mkdir()
        path.write_bytes(bytes(10))
        os.utime(path, (time.time() - age,) * 2)
    assert stored(tmp_path) == 20
    sweep(tmp_path, 600)
    assert stored(tmp_path) == 10
    sweep(tmp_path, 600)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_guesses_of_passwords_are_bounded(tmp_path, monkeypatch):
    """As Gradio answers, a wrong password is status 400; who guesses is known by address."""
    clock = [1000.0]
    monkeypatch.setattr(gate.time, "monotonic", lambda: clock[0])

    async def app(scope, receive, send):
        await PlainTextResponse("", 400)(scope, receive, send)

    guarded = Gate(app, tmp_path)

    def login(address: str) -> int:
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/login", "headers": [(b"host", b"localhost")]}
        answering = guarded(scope | {"client": (address, 1)}, None, send)
        with pytest.raises(StopIteration):  # it waits for nothing, and a browser's loop may run beside it
            answering.send(None)
        return sent[0]["status"]

    assert [login("10.0.0.1") for _ in range(7)] == [400] * 5 + [429] * 2
    assert login("10.0.0.2") == 400
    assert [login(f"2001:db8::{number}") for number in range(6)] == [400] * 5 + [429]  # one household's network
    clock[0] += gate.FORGIVEN_S + 1
    assert login("10.0.0.1") == 400


# Damaged files


def test_damaged_files_end_in_an_xray_or_a_sentence():
    result = campaign_files.campaign(150)
    assert not result.wrong, result.wrong
    assert {outcome for _, outcome in result.outcomes} == {"read", "refused"} and result.outcomes.total() == 150


def _faulty(pipe) -> None:
    """A reader with every fault that the campaign looks for."""
    pipe.recv()
    pipe.send(("read", 0))
    data = pipe.recv()
    if data == b"dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0 if data == b"takes memory" else 600)
    pipe.send(("read", campaign_files.MOST_BYTES + 1))


@POSIX
def test_the_campaign_sees_what_it_looks_for(monkeypatch):
    monkeypatch.setattr(campaign_files, "LONGEST_S", 1)
    reader = campaign_files.Reader(_faulty, "fork")
    assert "died" in reader.read(b"dies")[0]
    assert "memory" in reader.read(b"takes memory")[0]
    monkeypatch.setattr(campaign_files, "LONGEST_S", 0.2)
    assert "over 0.2 s" in reader.read(b"hangs")[0]
    reader.close()


# Surroundings


def _page(*arguments: str, **environment: str) -> subprocess.Popen:
    """`python app.py` in a bare environment."""
    command = [sys.executable, "app.py", "--weights", "nowhere", *arguments]
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@POSIX
def test_surroundings_that_lack_something(server, tmp_path):
    """A port in use, no folder for temporary files, a proxy that cannot reach this page, no HOME, a C locale."""
    taken = str(urlsplit(server[0]).port)
    bare = {"LC_ALL": "C", "HTTP_PROXY": "http://127.0.0.1:9", "TMPDIR": str(tmp_path)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pages = [_page("--port", taken, **bare), _page("--port", port, **bare)]
    assert pages[0].communicate(timeout=WAIT_S)[0].splitlines()[-1:] == [
        f"The page cannot be served at 127.0.0.1:{taken}; choose another --port."
    ]
    assert pages[0].returncode == 1
    assert pages[1].stdout.readline().startswith("MANet: http://127.0.0.1:")
    (folder,) = tmp_path.glob("manet-*")
    (folder / "film.png").write_bytes(b"an upload that nobody read")
    pages[1].send_signal(signal.SIGTERM)
    rest = pages[1].communicate(timeout=WAIT_S)[0]
    assert pages[1].returncode == 0 and "Traceback" not in rest and not list(tmp_path.glob("manet-*"))


def test_no_folder_for_temporary_files(monkeypatch):
    from ui.server import serve

    def nowhere(*args, **kwargs):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", nowhere)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit, match="set TMPDIR"):
        serve("127.0.0.1", 7860, "nowhere")
    with pytest.raises(SystemExit, match="one of --auth and --mcp"):
        serve("127.0.0.1", 7860, "nowhere", users=[("erika", "x")], mcp=True)


EARLY = """
import gc, sys, app
try:
    app.main(["--help"])
except SystemExit:
    assert not {"torch", "gradio"} & sys.modules.keys(), "the arguments need neither"
with app.nothing_to_collect():
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > 1000
"""


def test_the_arguments_are_read_before_the_page_is_imported():
    done = subprocess.run([sys.executable, "-c", EARLY], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "folder with manifest.json" in done.stdout


def test_ctrl_c_while_the_page_is_imported_ends_it(monkeypatch):
    import app

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "nothing_to_collect", interrupted)
    assert app.main(["--weights", "nowhere"]) is None


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x", "1234567"])
def test_a_port_is_a_number_of_a_port(port, capsys):
    import app

    with pytest.raises(SystemExit) as error:
        app.main(["--port", port])
    assert error.value.code == 2 and "from 1 to 65535" in capsys.readouterr().err


def test_the_models_that_are_asked_for_are_those_of_the_manifest(random_weights, tmp_path, monkeypatch):
    """Whatever it calls them; one that has none is refused with a sentence before the page starts."""
    import app

    asked = []
    monkeypatch.setattr(app, "nothing_to_collect", nullcontext)
    monkeypatch.setattr("ui.server.serve", lambda host, port, weights, models, *_: asked.append(models))
    entries = read_manifest(random_weights)
    write_manifest(tmp_path, {"resunet": entries["resunet"], "our own": entries["efficientnet_lite0_ma"]})
    app.main(["--weights", str(tmp_path), "--models", "our own"])
    app.main(["--weights", str(tmp_path / "nowhere"), "--models", "resnet34"])  # of which the page tells
    assert asked == [["our own"], ["resnet34"]]
    for name in ("resnet34", "resunet"):
        with pytest.raises(SystemExit, match=rf"^There are no weights of '{name}'; choose from: our own\.$"):
            app.main(["--weights", str(tmp_path), "--models", "our own", name])
