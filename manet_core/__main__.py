"""Command line: python -m manet_core analyze IMAGE... --out DIR, python -m manet_core batch SOURCE... --out DIR, and
python -m manet_core models."""

import argparse
import sys
from pathlib import Path

_EXAMPLES = """\
examples:
  python -m manet_core analyze chest.dcm other.png --out out
  python -m manet_core analyze films --recursive --out out --csv --no-panels    # a folder and those within
  python -m manet_core analyze chest.dcm --out out --models efficientnet_lite0_ma --explainer layercam
  python -m manet_core analyze chest.dcm --out out --json > chest.json
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
    one.add_argument("--json", action="store_true", help="print results.json instead of a table")
    many = verbs.add_parser("batch", parents=[common, asked], help="an archive of X-rays into Parquet files", **style)
    many.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="files, folders with all within, patterns, zip archives, @FILE with a source a line, or addresses that "
        "fsspec knows, such as s3://bucket/films",
    )
    many.add_argument("--list", action="append", default=[], metavar="FILE", help="the same as @FILE")
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


if __name__ == "__main__":
    sys.exit(main())
