"""Command line: python -m manet_core {analyze IMAGE... --out DIR, batch SOURCE... --out DIR, listen, models}."""

import argparse
import sys
from pathlib import Path

_EXAMPLES = """\
examples:
  python -m manet_core analyze chest.dcm other.png --out out
  python -m manet_core analyze films --recursive --out out --csv --no-panels    # a folder and those within
  python -m manet_core analyze chest.dcm --out out --models efficientnet_lite0_ma --explainer layercam
  python -m manet_core analyze chest.dcm --out out --json > chest.json
  python -m manet_core listen --out out --allow PACS --return-to PACS@pacs.example.org:104
  python -m manet_core batch archive/ films.zip --out results    # Parquet files; the same command goes on

exit status: 0 all read, 1 some failed, 2 usage or weights, 130 interrupted (what was finished is kept)
"""


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 some images failed, 2 usage or weights, 130 interrupted."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EXAMPLES}
    parser = argparse.ArgumentParser(prog="python -m manet_core", description=__doc__, **style)
    verbs = parser.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--weights", default="weights", help="folder with manifest.json, or another manifest file (default: weights)"
    )
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--models", help="comma-separated names; default: all that have weights")
    asked.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: CUDA when present")
    one = verbs.add_parser("analyze", parents=[common, asked], help="masks, readings and heatmaps of X-rays", **style)
    one.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="PNG, JPEG, TIFF, BMP, WebP or DICOM, or a folder: its files of these kinds, in the order of their names",
    )
    one.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for panels and results.json")
    one.add_argument("--recursive", "-r", action="store_true", help="of a folder, read the folders within it too")
    one.add_argument(
        "--explainer",
        metavar="NAME",
        help="what makes the heatmaps: gradcam (default), hirescam, layercam, layercam-finer, gradcam++, eigencam, "
        "attention (of networks that have it); and, in up to minutes, scorecam, lime, kernelshap, gradientshap, "
        "occlusion, integratedgradients",
    )
    one.add_argument("--csv", action="store_true", help="write results.csv too, one row a film and network")
    one.add_argument(
        "--no-panels",
        action="store_true",
        help="write no panels, which take most of the time; heatmaps, and in_lung in results.json, are then made only "
        "where --explainer asks for them",
    )
    one.add_argument(
        "--dicom",
        action="store_true",
        help="write the report (Secondary Capture) and the lungs (Segmentation) as DICOM too, with patient and study "
        "as the film's header has them",
    )
    one.add_argument("--json", action="store_true", help="print results.json instead of a table")
    _add_listen(verbs.add_parser("listen", parents=[common], help="take X-rays from a PACS, by DICOM", **style))
    many = verbs.add_parser("batch", parents=[common, asked], help="an archive of X-rays into Parquet files", **style)
    many.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="files, folders with all within, patterns, zip archives, @FILE with a source a line, or addresses that "
        "fsspec knows, such as s3://bucket/films",
    )
    many.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the Parquet files")
    many.add_argument("--engine", default="local", choices=["local", "ray"], help="default: local")
    many.add_argument("--workers", type=_positive, default=2, metavar="N", help="ray: processes, of one core each")
    many.add_argument("--gpus", type=float, default=0, metavar="N", help="ray: GPUs of a process, such as 0.5")
    many.add_argument(
        "--part", type=_positive, default=500, metavar="N", help="X-rays in a file: what an interruption may cost"
    )
    many.add_argument("--masks", action="store_true", help="keep the masks, too")
    many.add_argument("--heatmaps", action="store_true", help="make heatmaps, and keep them")
    verbs.add_parser("models", parents=[common], help="list the networks")
    args = parser.parse_args(argv)
    try:
        from . import commands  # takes seconds, in which a Ctrl-C may come

        return commands.run(args)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _add_listen(ear: argparse.ArgumentParser) -> None:
    ear.add_argument("--out", type=Path, metavar="DIR", help="folder for results, in which each start has its own")
    ear.add_argument("--return-to", type=_peer, metavar="AE@HOST:PORT", help="send the DICOM objects there")
    ear.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this computer only)")
    ear.add_argument("--port", type=int, choices=range(65536), default=11112, metavar="PORT", help="default: 11112")
    ear.add_argument("--title", type=_title, default="MANET", metavar="AE", help="own AE title (default: MANET)")
    ear.add_argument("--allow", type=_title, nargs="+", default=[], metavar="AE", help="AE titles that may call")
    ear.add_argument("--waiting", type=int, default=64, metavar="N", help="films that may wait (default: 64)")
    ear.add_argument("--models", help="comma-separated names; default: all that have weights")
    ear.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: CUDA when present")
    ear.add_argument("--csv", action="store_true", help="write results.csv too, one row a film and network")


def _title(text: str) -> str:
    """An AE title."""
    if not (0 < len(text.strip()) <= 16 and text.isascii() and text.isprintable() and "\\" not in text):
        raise argparse.ArgumentTypeError("an AE title has 1 to 16 characters of ASCII")
    return text.strip()


def _peer(text: str) -> tuple[str, str, int]:
    """Title, host and port of another DICOM program."""
    title, at, address = text.partition("@")
    host, colon, port = address.rpartition(":")
    if not (at and host and colon and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise argparse.ArgumentTypeError("give it as AE@HOST:PORT")
    return _title(title), host.strip("[]"), int(port)


if __name__ == "__main__":
    sys.exit(main())
