"""Serving the page: its theme, its passwords, its end."""

import os
import signal
import tempfile
import threading
from pathlib import Path

import safehttpx
from starlette.middleware import Middleware
from starlette.routing import Route

from .cases import CaseList
from .gate import Gate, patient
from .page import build
from .render import STYLE
from .shelves import Shelves
from .startup import gr
from .uploads import OwnUpload, sweep
from .viewer import FETCH

MOST_WAITING = 256  # requests in the queue
MOST_CONNECTIONS = 512  # a page has about four
KEEP_UPLOADS_S = 600  # seconds for which an upload waits to be read


def dark_theme() -> gr.themes.Base:
    """Greys and one accent, with the system's fonts; dark in light mode too, as X-rays are read in the dark."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.cyan,
        neutral_hue=gr.themes.colors.gray,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill_dark="#0e1114",
        block_background_fill_dark="#171c21",
        block_border_color_dark="#323a43",
        button_secondary_background_fill_dark="#242c34",
        button_secondary_background_fill_hover_dark="#323a43",
        checkbox_label_background_fill_dark="#242c34",
        checkbox_label_background_fill_hover_dark="#323a43",
        checkbox_background_color_selected_dark="#1b8ba3",
        slider_color_dark="#6cc5d9",
        input_background_fill_dark="#242c34",
    )
    for name, value in list(vars(theme).items()):
        if name.endswith("_dark") and value is not None:
            setattr(theme, name.removesuffix("_dark"), value)
    return theme


def accounts(path: Path) -> list[tuple[str, str]]:
    """(name, password) of each line NAME:PASSWORD of a file.

    Raises:
        SystemExit: the file cannot be read, or a line is none of these; the text says what to do.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise SystemExit(f"{path} cannot be read; give a text file with a line NAME:PASSWORD for each user.") from None
    pairs = [tuple(line.split(":", 1)) for line in lines]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise SystemExit(f"{path} needs a line NAME:PASSWORD for each user, and nothing else.")
    return pairs


def serve(
    host: str,
    port: int,
    weights: str | Path,
    models: list[str] | None = None,
    users: list[tuple[str, str]] | None = None,
    mcp: bool = False,
    names: tuple[str, ...] = (),
    cases: CaseList | None = None,
) -> None:
    """Serve the page until interrupted, by Ctrl-C or SIGTERM.

    Args:
        host: address to listen on.
        port: of that address.
        weights: folder with manifest.json, or a manifest file.
        models: the classifiers to run; None: all that have weights.
        users: (name, password) of whoever may use the page; None: everybody.
        mcp: serve the endpoints to language models, too; not together with `users`.
        names: by which browsers call this server, beside localhost, this machine's name, `host` and IP addresses.
        cases: films that a lecturer prepared for students to read; None: none.

    Raises:
        SystemExit: the address is taken, or a folder or package is missing; the text says what to do.
    """
    if mcp and users:  # Gradio serves MCP to whoever asks
        raise SystemExit("--mcp knows no passwords; start the page with one of --auth and --mcp.")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = (
        "*"  # Gradio asks itself whether it runs, and no proxy on the way can know
    )
    safehttpx.get = _fetch_nothing
    gr.route_utils.GradioUploadFile = OwnUpload
    over = threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite end, which deletes the temporary folder
    try:
        with _own_folder() as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder
            gate, shelves = Middleware(Gate, folder=folder, host=host, names=names), Shelves()
            route = Route(FETCH, shelves.answer, methods=["POST"])
            demo = build(weights, folder, models, shelves, cases).queue(max_size=MOST_WAITING, api_open=False)
            demo.launch(
                server_name=host, server_port=port, share=False, quiet=True, run_history=False,
                enable_monitoring=False, footer_links=[], max_file_size="200mb", ssr_mode=False,
                state_session_capacity=64, theme=dark_theme(), css_paths=STYLE, prevent_thread_lock=True,
                auth=users, mcp_server=mcp, app_kwargs={"middleware": [gate], "routes": [route]},
            )  # fmt: skip
            demo.server.config.http_protocol_class = patient(demo.server.config.http_protocol_class)
            demo.server.config.limit_concurrency = MOST_CONNECTIONS
            threading.Thread(target=_sweep_until, args=(over, Path(folder), shelves), daemon=True).start()
            print(f"MANet: http://{host}:{port} (Ctrl-C ends it)", flush=True)
            demo.block_thread()
            over.set()
    except KeyboardInterrupt:  # while starting; later Gradio ends by itself
        pass
    except ImportError as error:
        raise SystemExit("--mcp needs one package more: pip install 'gradio[mcp]'") from error
    except OSError as error:
        raise SystemExit(f"The page cannot be served at {host}:{port}; choose another --port.") from error


def _own_folder() -> tempfile.TemporaryDirectory:
    """A new folder for uploads, in the one that GRADIO_TEMP_DIR or the system names for temporary files."""
    try:
        parent = os.environ.get("GRADIO_TEMP_DIR")
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="manet-", dir=parent)
    except OSError as error:
        raise SystemExit("There is no folder for temporary files; set TMPDIR to one that may be written.") from error


async def _fetch_nothing(url: str, *args, **kwargs) -> None:
    """In place of what Gradio would fetch an address with that stands where a file should."""
    raise gr.Error("This server fetches nothing from elsewhere; send the file itself.", print_exception=False)


def _sweep_until(over: threading.Event, folder: Path, shelves: Shelves) -> None:
    while not over.wait(60):
        sweep(folder, KEEP_UPLOADS_S)
        shelves.sweep()
