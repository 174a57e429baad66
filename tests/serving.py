"""Processes forked from one that has imported everything once, as that takes seconds; and the page in one of them."""

import multiprocessing
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
WAIT_S = float(os.environ.get("MANET_TEST_WAIT", 120))  # for machines that do much else
processes = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    processes.set_forkserver_preload(["ui.server", "train.paper"])


@contextmanager
def served(weights: Path, temporary: Path, *options: str, hostile: bool = False):
    """(url, folder of uploads) of the page that app.py serves; unless asked in `hostile` ways, it logs no traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uploads, log = temporary / "uploads", temporary / "log"
    arguments = ["--port", str(port), "--weights", str(weights), *options]
    process = processes.Process(target=_serve, args=(arguments, log, uploads))
    process.start()
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_until(lambda: _answers(url) or not process.is_alive())
        assert process.is_alive(), log.read_text()
        yield url, uploads
    finally:
        process.terminate()
        process.join(WAIT_S)
    assert process.exitcode is not None, "it does not end"
    assert hostile or "Traceback" not in log.read_text()


def process_at(url: str):
    """psutil's process that listens at an address of this machine."""
    import psutil

    port = int(url.rstrip("/").rsplit(":", 1)[1])
    found = (c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
    return psutil.Process(next(found))


def _serve(arguments: list[str], log: Path, uploads: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    import app

    app.main(arguments)


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
