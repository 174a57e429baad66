"""Command line: python -m manet_core analyze IMAGE... --out DIR, and python -m manet_core models."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .files.xray import XRayError, load_xray
from .networks.registry import create_classifier, list_models
from .pipeline import Pipeline
from .report import save_report
from .weights import WeightsError, read_manifest


def analyze(args: argparse.Namespace) -> int:
    """Write a panel PNG per image and results.json; 0: all read, 1: some failed."""
    models = None if args.models is None else [name for name in args.models.split(",") if name]
    pipe = Pipeline.load(args.weights, models, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    results, panels = [], _panel_names(args.images)
    try:
        for image, panel in zip(tqdm(args.images, unit="X-ray", disable=len(args.images) < 2), panels):
            try:
                analysis = pipe.analyze(load_xray(image))
            except XRayError as error:
                print(f"{image}: {error}", file=sys.stderr)
                results.append({"file": str(image), "error": str(error)})
                continue
            save_report(analysis, args.out / panel, title=image.name, hashes=pipe.hashes)
            results.append({"file": str(image)} | analysis.to_dict())
    finally:  # what was read before a Ctrl-C is kept
        part = args.out / "results.json.part"
        part.write_text(json.dumps(results, indent=2) + "\n")
        part.replace(args.out / "results.json")
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        _print_table(results)
    return int(any("error" in result for result in results))


def models(args: argparse.Namespace) -> int:
    """List every network, its parameters, and whether weights for it are there."""
    try:
        shipped = read_manifest(args.weights)
    except WeightsError as error:
        print(error, file=sys.stderr)
        shipped = {}
    for name in list_models():
        with torch.device("meta"):  # counts without allocating
            parameters = sum(p.numel() for p in create_classifier(name).parameters())
        print(f"{name:26}{parameters / 1e6:8.2f} M parameters   {'weights' if name in shipped else 'no weights'}")
    return 0


def _panel_names(images: list[Path]) -> list[str]:
    """One file name a picture; pictures of the same name in different folders are numbered."""
    names, seen = [], {}
    for image in images:
        stem = image.name or "image"
        seen[stem] = seen.get(stem, 0) + 1
        names.append(f"{stem}.png" if seen[stem] == 1 else f"{stem}-{seen[stem]}.png")
    return names


def _print_table(results: list[dict]) -> None:
    for result in results:
        if "error" in result:
            continue
        print(result["file"])
        for model, reading in result["readings"].items():
            predicted = reading["predicted"]
            print(f"  {model:26}{predicted:22}{reading['probabilities'][predicted]:6.1%}")
        for warning in result["warnings"]:
            print(f"  warning: {warning}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 some images failed, 2 usage or weights."""
    parser = argparse.ArgumentParser(prog="python -m manet_core", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--weights", default="weights", help="folder with manifest.json (default: weights)")
    one = verbs.add_parser("analyze", parents=[common], help="masks, readings and heatmaps of X-rays")
    one.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG, JPEG, TIFF, BMP, WebP or DICOM")
    one.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for panels and results.json")
    one.add_argument("--models", help="comma-separated names; default: all that have weights")
    one.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: CUDA when present")
    one.add_argument("--json", action="store_true", help="print results.json instead of a table")
    verbs.add_parser("models", parents=[common], help="list the networks")
    args = parser.parse_args(argv)
    try:
        return analyze(args) if args.verb == "analyze" else models(args)
    except WeightsError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{args.out} cannot be written to ({error.strerror}); choose another --out.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; what was finished is in the output folder.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
