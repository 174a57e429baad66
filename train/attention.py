"""Attentions and controls by one recipe: does attention help, and how much is answered without lung tissue?

    python -m train.attention --data DATA --init weights/nih14.efficientnet_lite0.safetensors --out runs/attention

trains one backbone plain, with mask attention, with normalised mask attention and with CBAM, and the plain one three
times more, shown something else than the lungs (`CONTROLS`). Every setting but these two is the same, and each is
trained from the same seeds. What is missing below --out is trained, what was interrupted goes on, what is finished is
skipped. Then results.json and tables.md compare all with the plain network that sees the lungs, seed by seed.

The recipe is "broad", twenty epochs at 224 pixels, for a GPU. `--size` and `--epochs` make it short.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from manet_core import list_models
from manet_core.networks.registry import human_name

from . import classify, run_verb
from .measures.controls import FIGURES, SHOWN, figures, over_seeds
from .measures.markdown import percent, table, write_among_papers, write_results
from .measures.statistics import interval
from .measures.study import Readings, Study
from .recipe import Recipe, Run, add_options, add_run_options, recipe_from, run_from

ATTENTIONS = ("", "_ma", "_nma", "_cbam")
CONTROLS = ("outside", "shape", "whole")  # of the plain network: what it sees
BACKBONES = tuple(name for name in list_models() if all(name + suffix in list_models() for suffix in ATTENTIONS))


def arms(backbone: str) -> dict[str, tuple[str, str]]:
    """{folder: (network, what it sees)}, the one that all are compared with first."""
    return {backbone + suffix: (backbone + suffix, "lungs") for suffix in ATTENTIONS} | {
        f"{backbone}_{sees}": (backbone, sees) for sees in CONTROLS
    }


def train(recipe: Recipe, run: Run) -> None:
    """One training, unless it is finished.

    Raises:
        SystemExit: `run.out` holds a training by another recipe.
    """
    result = Path(run.out) / "result.json"
    if not result.exists():
        classify.train(recipe, run)
        return
    finished = asdict(Recipe.of(json.loads(result.read_text(encoding="utf-8"))["settings"]))
    if changed := [name for name, value in asdict(recipe).items() if finished[name] != value]:
        raise SystemExit(f"{run.out} holds a training with another {', '.join(changed)}: choose another --out.")


def compare(readings: dict[str, dict[int, Readings]]) -> dict[str, dict]:
    """Figures of each arm, and how much more or less than the first one's they are, seed by seed.

    Args:
        readings: {arm: {seed: what its network says}}, all of the same X-rays.

    Returns:
        {arm: {"seeds", "n", "external", `FIGURES`, and "minus_first", of those of `FIGURES` again}}; all intervals
        resample patients and, where there are several, seeds.
    """
    found = {arm: {seed: figures(one) for seed, one in of.items()} for arm, of in readings.items()}
    first, out = next(iter(found.values())), {}
    for number, (arm, of) in enumerate(found.items()):
        one, shared = next(iter(readings[arm].values())), sorted(of.keys() & first.keys())
        out[arm] = {
            "seeds": sorted(of),
            "n": int((one.split("test") & one.labelled).sum()),
            "external": int(one.known("external").sum()),
            **{name: interval(*over_seeds([run[name] for run in of.values()], number)) for name in one_of(of)},
        }
        if number and shared:
            gaps = {
                name: [(of[s][name][0] - first[s][name][0], of[s][name][1] - first[s][name][1]) for s in shared]
                for name in one_of(of)
            }
            out[arm]["minus_first"] = {name: interval(*over_seeds(gap, number)) for name, gap in gaps.items()}
    return out


def one_of(runs: dict[int, dict]) -> list[str]:
    """The names of the figures that there are, the same of every seed."""
    return list(next(iter(runs.values())))


def title(network: str, sees: str) -> str:
    """How people write an arm."""
    backbone, attention = human_name(network)
    return f"{backbone}, {attention}" if sees == "lungs" else f"{backbone}, plain; sees {SHOWN[sees]}"


def markdown(results: dict) -> str:
    """The comparison as Markdown."""
    names, found = arms(results["backbone"]), results["arms"]
    measured = [name for name in FIGURES if name in next(iter(found.values()))]
    head = [FIGURES[name] for name in measured]
    rows = [[title(*names[arm]), len(f["seeds"]), *(percent(f[name]) for name in measured)] for arm, f in found.items()]
    lines = ["%, 95 % CI over patients and seeds:", "", *table(["network", "seeds", *head], rows)]
    rows = [
        [title(*names[arm]), *(percent(f["minus_first"][name]) for name in measured)]
        for arm, f in found.items()
        if "minus_first" in f
    ]
    plain = title(*next(iter(names.values())))
    if rows:
        lines += [f"Minus {plain}, from the same seeds, points:", "", *table(["network", *head], rows)]
    recipe, any_ = results["recipe"], next(iter(found.values()))
    start = f"start: `{recipe['init']}`" if recipe["init"] else "random or ImageNet weights"
    lines += [
        f"* {recipe['epochs']} epochs at {recipe['size']} pixels, batches of {recipe['batch']}, learning rate"
        f" {recipe['lr']:g}, augmentation {recipe['augment']}; {start}.",
        f"* n = {any_['n']} (test, one class each), {any_['external']} (external).",
        f"* A training took {results['minutes']:.0f} minutes (median; {results['device'].upper()}).",
    ]
    if any(len(f["seeds"]) == 1 for f in found.values()):
        lines.append("* The interval of a single seed leaves out how much another seed would differ.")
    return "\n".join(lines) + "\n"


def measure(recipe: Recipe, run: Run, backbone: str, seeds: int) -> dict:
    """What the finished trainings below `run.out` come to."""
    study = Study(run.data, Path(run.weights), Path(run.cache))
    readings, logs = {}, []
    for arm in arms(backbone):
        of = {r.seed: said for _, r, said in study.runs(Path(run.out) / arm) if r.seed < seeds}
        if of:
            readings[arm] = of
            logs += [
                json.loads((Path(run.out) / arm / str(seed) / "result.json").read_text(encoding="utf-8")) for seed in of
            ]
    return {
        "backbone": backbone,
        "recipe": {k: v for k, v in asdict(recipe).items() if k not in ("model", "sees", "seed")},
        "minutes": float(np.median([log["seconds"] for log in logs])) / 60,
        "device": logs[0]["device"],
        "arms": compare(readings),
    }


def main() -> None:
    """Train, compare and report from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backbone", choices=BACKBONES, default="efficientnet_lite0")
    p.add_argument("--trials", type=int, default=3, help="seeds of each, from 0")
    p.add_argument("--report", action="store_true", help="train nothing: what the finished ones come to")
    p.add_argument(
        "--record", type=Path, metavar="DIR", help="write there too: results/attention also into docs/papers.md"
    )
    add_run_options(p)
    add_options(p, "classify", leave_out=("task", "model", "seed", "sees"))
    p.set_defaults(recipe="broad")
    args = p.parse_args()
    if args.trials < 1:
        raise SystemExit("--trials must be 1 or more.")
    recipe, run = recipe_from(args, "classify"), run_from(args)
    wanted = [(arm, what, seed) for seed in range(args.trials) for arm, what in arms(args.backbone).items()]
    if args.report:
        wanted = [one for one in wanted if Path(run.out, one[0], str(one[2]), "result.json").exists()]
    if not any(arm == args.backbone for arm, _, _ in wanted):
        raise SystemExit(f"No finished {args.backbone} below {run.out}, with which to compare: leave --report away.")
    for number, (arm, (network, sees), seed) in enumerate(wanted, 1):
        print(f"{number} of {len(wanted)}: {title(network, sees)}, seed {seed}", flush=True)
        mine = replace(recipe, model=network, sees=sees, seed=seed)
        train(mine, replace(run, out=f"{run.out}/{arm}/{seed}"))
    results = measure(recipe, run, args.backbone, args.trials)
    write_results(results, markdown(results), Path(run.out), args.record)
    if args.record:
        write_among_papers(args.record, "attention", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    run_verb(main)
