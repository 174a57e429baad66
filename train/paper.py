"""The paper's experiment: every network, three trials, every table and figure (MANet, section 4).

    python -m train.paper --data DATA --out runs/paper

trains what is missing below --out, goes on with what was interrupted, skips
what is finished, and then writes tables.md, results.json, fig10.png (validation
curves) and fig9-*.png (heatmaps; they show X-rays, so keep them private). Each
run is a folder SPLIT/MODEL/TRIAL of `train.classify`; the trial is its seed. A
finished run may also have been trained by hand: the tables name its recipe.
With `--shipped`, networks without a run are there with their shipped weights,
and the last layer with which they were trained.

The defaults are the paper's recipe and its ten networks, under both splits:
sixty trainings of 200 epochs, meant for several GPUs. Shorter:

    python -m train.paper --data DATA --out runs/short --models resnet34 resnet34_ma \\
        --split patient --trials 1 --epochs 10 --optimizer adamw --lr 1e-3 --schedule onecycle

`--report` trains nothing and writes what can be said so far. What `--record` has
put into a folder counts as well when it is named again, wherever it was trained.
"""

import argparse
import contextlib
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from manet_core import CLASSES, create_classifier, list_models
from manet_core.weights import load_network, read_manifest, sha256

from . import classify, figures, tables
from .benchmark import benchmark_mask_attention
from .complexity import last_map, table_3
from .data import read_index, split_by_image
from .evaluate import measure_masks, write_between
from .record import read_runs, tested_rows, write_runs

PAPERS_TEN = [
    *("resnet34", "resnet34_ma", "resnet34_cbam", "resnet50", "resnet50_ma", "resnet50_cbam"),
    *("vgg16", "vgg16_ma", "inception_v3", "inception_v3_ma"),
]


def run_folder(args: argparse.Namespace, split: str, model: str, trial: int) -> Path:
    """Where one training lives."""
    return args.out / split / model / str(trial)


def missing_runs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of every training that is not finished, all networks of a trial before the next trial."""
    runs = []
    for trial in range(args.trials):
        for split in args.split:
            for model in args.models:
                out = run_folder(args, split, model, trial)
                if not (out / "result.json").exists():
                    shared = {k: v for k, v in vars(args).items() if k not in tables.OWN_OPTIONS}
                    runs.append(argparse.Namespace(**shared | dict(split=split, model=model, seed=trial, out=str(out))))
    return runs


def train_quietly(run: argparse.Namespace) -> None:
    """One training in a process of its own; what it prints goes to train.log in its folder."""
    Path(run.out).mkdir(parents=True, exist_ok=True)
    with (
        (Path(run.out) / "train.log").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        classify.train(run)


def train_missing(args: argparse.Namespace) -> None:
    """Train, one after another with their own progress bars, or `args.jobs` side by side."""
    runs = missing_runs(args)
    total = len(args.split) * len(args.models) * args.trials
    print(f"{total - len(runs)} of {total} trainings are finished")
    if args.jobs == 1 or not runs:
        for number, run in enumerate(runs, total - len(runs) + 1):
            print(f"training {number} of {total}: {run.model}, trial {run.seed}, split by {run.split}", flush=True)
            classify.train(run)
        return
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    try:
        waiting = {pool.submit(train_quietly, run): run for run in runs}
        for done in tqdm(as_completed(waiting), "training", total, initial=total - len(runs), unit="run"):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def finished_runs(args: argparse.Namespace) -> list[dict]:
    """Every finished training below --out, and `--shipped`, with the classes (N,) that it gives the test split.

    Folders that the command did not ask for are read too, so that one table can gather what several commands trained.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and args.device == "auto" else "cpu")
    found = []

    def add(split: str, model: str, trial: int, settings: dict, load: Callable, cached: Path, accuracy: list) -> None:
        trained = dict(split=split, size=settings["size"], sees=settings.get("sees", "lungs"))
        options = argparse.Namespace(**vars(args) | trained)
        if not cached.exists():
            print(f"testing {model}, trial {trial}, split by {split}", flush=True)
            net = load().to(device, memory_format=torch.channels_last)
            cached.parent.mkdir(parents=True, exist_ok=True)
            np.save(cached, classify.predict(net, classify.lung_pictures(options, "test"), device).argmax(1))
        recipe = {option: settings.get(option) for option in tables.RECIPE}
        found.append(dict(split=split, model=model, trial=trial, recipe=recipe, accuracy=accuracy,
                          called=np.load(cached), load=load, options=options))  # fmt: skip

    for path in sorted(args.out.glob("*/*/*/result.json")):
        split, model, trial = path.parent.parts[-3:]
        if split not in ("patient", "image") or model not in list_models() or not trial.isdigit():
            continue
        weights = path.with_name("best.safetensors")
        cached = path.with_name(f"test-{sha256(weights)[:12]}.npy")
        accuracy = pd.read_csv(path.with_name("log.csv")).accuracy.to_list()
        settings = json.loads(path.read_text())["settings"]
        add(split, model, int(trial), settings, partial(trained_network, model, weights), cached, accuracy)
    for model in args.shipped:
        if not any(run["model"] == model and run["split"] == "patient" for run in found):
            entry = read_manifest(args.weights).get(model)
            if entry is None:
                raise SystemExit(f"There are no weights of {model} in {args.weights}: leave it out of --shipped.")
            cached = args.out / "shipped" / f"{model}-{entry['sha256'][:12]}.npy"
            load = partial(load_network, args.weights, model, refitted=False)
            add("patient", model, 0, entry["training"]["settings"], load, cached, [])
    return found


def trained_network(model: str, weights: Path) -> nn.Module:
    """A classifier with the weights of a training, in evaluation mode."""
    net = create_classifier(model)
    net.load_state_dict(load_file(weights))
    return net.eval()


def measure_costs(runs: list[dict], repeats: int) -> dict[str, dict]:
    """Table 3: counted at the paper's 512×512, timed at the size that was trained, plain and MA in pairs."""
    costs = {model: table_3(model) for model in dict.fromkeys(run["model"] for run in runs)}
    for model, cost in costs.items():
        size = cost["size"] = next(run["recipe"]["size"] for run in runs if run["model"] == model)
        if cost["map_elements"]:
            cost["last_map"] = last_map(create_classifier(model), size)
        if f"{model}_ma" not in costs:
            continue
        timed = benchmark_mask_attention(model, repeats, size)
        for what in ("inference", "training step"):
            figure = next(value for name, value in timed.items() if what in name)
            key = what.replace(" ", "_")
            cost[f"{key}_ms"], costs[f"{model}_ma"][f"{key}_ms"] = figure["b_ms"], figure["a_ms"]
            costs[f"{model}_ma"][f"{key}_ratio"] = figure["ratio"]
    return costs


def main() -> None:
    """Train and report from the command line."""
    p = classify.options(__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--models", nargs="+", choices=list_models(), default=PAPERS_TEN, metavar="MODEL")
    p.add_argument("--trials", type=int, default=3)
    p.add_argument("--split", nargs="+", choices=["patient", "image"], default=["patient", "image"])
    p.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    p.add_argument("--repeats", type=int, default=25, help="timings of each pair in Table 3")
    p.add_argument("--report", action="store_true", help="train nothing")
    p.add_argument(
        "--shipped", nargs="+", choices=list_models(), default=[], metavar="MODEL",
        help="with no run of theirs below --out, count their shipped weights, split by patient, as a first trial"
    )  # fmt: skip
    p.add_argument(
        "--record",
        type=Path,
        metavar="DIR",
        help="copy what shows no X-ray there: results/paper, with the README's table",
    )
    args = p.parse_args()
    args.out = Path(args.out)
    if not args.report:
        train_missing(args)
    index = read_index(args.data)
    indices = {"patient": index, "image": split_by_image(index)}
    tested = tested_rows(indices)
    runs = finished_runs(args)
    if args.record:
        runs += read_runs(args.record / "runs.json", runs, tested)
    if not runs:
        raise SystemExit(f"There is no finished training below {args.out}: leave --report away.")
    runs.sort(key=lambda run: (run["split"] == "image", list_models().index(run["model"]), run["trial"]))
    for run in runs:
        rows = tested[run["split"]]
        run["labels"], run["patients"] = rows.label.map(CLASSES.index).to_numpy(), rows.patient.to_numpy()

    results = tables.summarise(runs, indices, args.trials)
    results["costs"] = measure_costs(runs, args.repeats)
    results["segmentation"] = tables.segmentation(measure_masks(args.data, args.weights, "test"))
    results["verdicts"] = tables.verdicts(results)
    for folder in filter(None, (args.out, args.record)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "tables.md").write_text(tables.markdown(results))
        figures.validation_curves(runs, folder / "fig10.png")
    if args.record:
        write_runs(args.record / "runs.json", runs, tested)
        readme = args.record.parent.with_name("README.md")
        if readme.exists():
            write_between(readme, "paper", tables.claims(results))
    for path in figures.heatmaps(args.out, [run for run in runs if "load" in run]):
        print(f"{path} shows X-rays: do not publish it unless their licences allow it")
    print(tables.markdown(results))


if __name__ == "__main__":
    main()
