"""What the verbs of the command line do."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .explain import Explainer, get_explainer
from .files.xray import XRayError, load_xray
from .networks.registry import create_classifier, list_models
from .pipeline import Analysis, Pipeline
from .report import save_report
from .tasks import get_task
from .weights import SEGMENT, WeightsError, read_manifest, task_of

_SAVE_S = 5  # seconds between two looks at a growing results.json


def run(args: argparse.Namespace) -> int:
    """Do what `args` ask for; returns the exit status."""
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


def analyze(args: argparse.Namespace) -> int:
    """Write a panel PNG per image and results.json; 0: all read, 1: some failed, 130: interrupted."""
    names = None if args.models is None else [name for name in args.models.split(",") if name]
    try:
        explainer = get_explainer(args.explainer)
        pipe = Pipeline.load(args.weights, names, args.device)
        pipe.check_suits(explainer)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    results, table = [], []
    _save(results, args.out)
    try:
        saved = time.monotonic()
        images = tqdm(args.images, unit="X-ray", disable=len(args.images) < 2)
        for image, panel in zip(images, _panel_names(args.images)):
            try:
                analysis = _analyze(pipe, image, explainer)
            except XRayError as error:
                tqdm.write(f"{image}: {error}", file=sys.stderr)
                results.append({"file": str(image), "error": str(error)})
            else:
                save_report(analysis, args.out / panel, title=image.name, hashes=pipe.hashes)
                results.append({"file": str(image)} | analysis.to_dict())
                table += [str(image), *_lines(analysis)]
            if time.monotonic() - saved > _SAVE_S:
                _save(results, args.out)
                saved = time.monotonic()
    except KeyboardInterrupt:
        print("Interrupted; what was finished is in the output folder.", file=sys.stderr)
        return 130
    finally:
        _save(results, args.out)
    for line in [json.dumps(results, indent=2)] if args.json else table:
        print(line)
    return int(any("error" in result for result in results))


def models(args: argparse.Namespace) -> int:
    """List every network, its parameters, the task of its weights, and whether there are any."""
    try:
        entries = read_manifest(args.weights)
    except WeightsError as error:
        print(error, file=sys.stderr)
        entries = {}
    shipped = {name: entry for name, entry in entries.items() if entry.get("task") != SEGMENT}
    for name in dict.fromkeys([*list_models(), *shipped]):
        network, task, classes = name, "", {}
        if name in shipped:
            network, task = shipped[name]["network"]["name"], shipped[name]["task"]
            classes = {"num_classes": len(task_of(name, shipped[name]).classes)}
        with torch.device("meta"):  # counts without allocating
            parameters = sum(p.numel() for p in create_classifier(network, **classes).parameters())
        weights = "weights" if name in shipped else "no weights"
        print(f"{name:26}{parameters / 1e6:8.2f} M parameters   {task:8}  {weights}")
    return 0


def _analyze(pipe: Pipeline, image: Path, explainer: Explainer) -> Analysis:
    layout = "{l_bar}{bar}| {n:.1f} of {total} networks [{elapsed}<{remaining}]"
    total = len(pipe.models)
    with tqdm(total=total, desc=explainer.title, bar_format=layout, leave=False, disable=not explainer.slow) as bar:
        return pipe.analyze(
            load_xray(image), explainer=explainer.name, progress=lambda done, _: bar.update(done - bar.n)
        )


def _panel_names(images: list[Path]) -> list[str]:
    """One file name a picture; pictures of the same name in different folders are numbered."""
    names, seen = [], {}
    for image in images:
        stem = image.name or "image"
        seen[stem] = seen.get(stem, 0) + 1
        names.append(f"{stem}.png" if seen[stem] == 1 else f"{stem}-{seen[stem]}.png")
    return names


def _save(results: list[dict], folder: Path) -> None:
    """Replace results.json whole, so that it can be read at any moment."""
    part = folder / "results.json.part"
    part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "results.json")


def _lines(analysis: Analysis) -> list[str]:
    """An analysis as lines of a table: a network and what it holds for true each, and the warnings."""
    lines = []
    for model, reading in analysis.readings.items():
        if get_task(reading.task).exclusive:
            said = f"{reading.predicted:22}{reading.probabilities[reading.predicted]:6.1%}"
        else:
            said = ", ".join(f"{name} {reading.probabilities[name]:.1%}" for name in reading.present) or "no finding"
        lines.append(f"  {model:26}{said}")
    return lines + [f"  warning: {warning}" for warning in analysis.warnings]
