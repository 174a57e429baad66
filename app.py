"""The web page: python app.py [--host 127.0.0.1] [--port 7860] [--weights weights/families.json]."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ui.cases import CaseList


def port(text: str) -> int:
    """A port's number, checked."""
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536):
        raise argparse.ArgumentTypeError("give a number from 1 to 65535")
    return int(text)


@contextmanager
def nothing_to_collect() -> Iterator[None]:
    """For imports: what they make stays, and looking for garbage among it would take a fifth of the page's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def check_models(models: list[str], weights: Path) -> None:
    """Nothing, if `models` are classifiers of the manifest; if that cannot be read, the page says so.

    Raises:
        SystemExit: one of them is not; one sentence that says which, and what there is.
    """
    from manet_core.weights import SEGMENT, WeightsError, read_manifest

    try:
        entries = read_manifest(weights)
    except WeightsError:
        return
    known = [name for name, entry in entries.items() if entry.get("task") != SEGMENT]
    if unknown := [name for name in models if name not in known]:
        raise SystemExit(f"There are no weights of {unknown[0]!r}; choose from: {', '.join(known) or 'none'}.")


def case_list(path: Path, weights: Path, models: list[str] | None) -> CaseList:
    """A lecturer's case list, for the networks that will answer.

    Raises:
        SystemExit: it cannot be used; a sentence for each problem.
    """
    from ui.cases import CasesError, asked_task, load_cases
    from ui.networks import Networks

    try:
        return load_cases(path, asked_task(Networks(weights, models).tasks()))
    except CasesError as error:
        raise SystemExit(str(error)) from None


def main(argv: list[str] | None = None) -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument("--port", type=port, default=7860)
    parser.add_argument(
        "--name", action="append", default=[], help="a further name of this server, as a proxy has it; may be repeated"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path(__file__).parent / "weights" / "families.json",
        help="folder with manifest.json, or another manifest in such a folder (default: the families that are shipped)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="run these of the manifest alone (default: all with weights)",
    )
    parser.add_argument(
        "--auth", type=Path, metavar="FILE", help="ask for a name and password, a line NAME:PASSWORD each"
    )
    parser.add_argument(
        "--cases",
        type=Path,
        metavar="DIR",
        help="folder or zip archive with films and answers.csv, to be read first",
    )
    parser.add_argument("--mcp", action="store_true", help="also serve the endpoints to language models, by MCP")
    args = parser.parse_args(argv)
    try:
        with nothing_to_collect():
            from ui.server import accounts, serve  # takes seconds, in which a Ctrl-C may come
    except KeyboardInterrupt:
        return
    if args.models:
        check_models(args.models, args.weights)
    users = accounts(args.auth) if args.auth else None
    cases = case_list(args.cases, args.weights, args.models) if args.cases else None
    serve(args.host, args.port, args.weights, args.models, users, args.mcp, tuple(args.name), cases)


if __name__ == "__main__":
    main()
