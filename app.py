"""The web page: python app.py [--host 127.0.0.1] [--port 7860] [--weights weights]."""

import argparse
from pathlib import Path

from manet_core import list_models
from ui.server import accounts, serve


def main(argv: list[str] | None = None) -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path(__file__).parent / "weights",
        help="folder with manifest.json, or another manifest in such a folder",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list_models(),
        metavar="MODEL",
        help="run these alone (default: all with weights)",
    )
    parser.add_argument(
        "--auth", type=Path, metavar="FILE", help="ask for a name and password, a line NAME:PASSWORD each"
    )
    parser.add_argument("--mcp", action="store_true", help="also serve the endpoints to language models, by MCP")
    args = parser.parse_args(argv)
    users = accounts(args.auth) if args.auth else None
    serve(args.host, args.port, args.weights, args.models, users, args.mcp)


if __name__ == "__main__":
    main()
