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
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from torch import channels_last, nn
from tqdm import tqdm

from manet_core import CLASSES, create_classifier, list_models
from manet_core.tasks import MANET
from manet_core.weights import load_network, read_manifest, sha256

from . import classify, figures, run_verb, tables
from .benchmark import benchmark_mask_attention
from .complexity import last_map, table_3
from .data import lung_pictures, read_index, split_by_image, state
from .engine import device_of
from .measures.markdown import write_among_papers
from .measures.segmentation import measure_masks
from .recipe import Recipe, Run, add_options, add_run_options, recipe_from, run_from
from .record import read_runs, tested_rows, write_runs

PAPERS_TEN = [
    *("resnet34", "resnet34_ma", "resnet34_cbam", "resnet50", "resnet50_ma", "resnet50_cbam"),
    *("vgg16", "vgg16_ma", "inception_v3", "inception_v3_ma"),
]


def trainings(recipe: Recipe, run: Run, models: list[str], splits: list[str], trials: int) -> list[tuple[Recipe, Run]]:
    """Every training of the experiment, all networks of a trial before the next trial."""
    return [
        (replace(recipe, split=split, model=model, seed=trial), replace(run, out=f"{run.out}/{split}/{model}/{trial}"))
        for trial in range(trials)
        for split in splits
        for model in models
    ]


def leave_ctrl_c_to_the_parent() -> None:
    """In a process that trains beside others: the one that started them is told, and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train_quietly(recipe: Recipe, run: Run) -> None:
    """One training in a process of its own; what it prints goes to train.log in its folder."""
    Path(run.out).mkdir(parents=True, exist_ok=True)
    with (
        (Path(run.out) / "train.log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        classify.train(recipe, run)


def train_missing(every: list[tuple[Recipe, Run]], jobs: int) -> None:
    """Train what is not finished, one after another with their own progress bars, or `jobs` side by side."""
    missing = [(recipe, run) for recipe, run in every if not (Path(run.out) / "result.json").exists()]
    done = len(every) - len(missing)
    print(f"{done} of {len(every)} trainings are finished")
    if jobs == 1 or not missing:
        for number, (recipe, run) in enumerate(missing, done + 1):
            what = f"{recipe.model}, trial {recipe.seed}, split by {recipe.split}"
            print(f"training {number} of {len(every)}: {what}", flush=True)
            classify.train(recipe, run)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=leave_ctrl_c_to_the_parent)
    try:
        waiting = [pool.submit(train_quietly, recipe, run) for recipe, run in missing]
        for finished in tqdm(as_completed(waiting), "training", len(every), initial=done, unit="run"):
            finished.result()
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()  # each goes on from its last finished epoch
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def finished_runs(out: Path, run: Run, shipped: list[str]) -> list[dict]:
    """Every finished training below `out`, and `shipped` networks, with the classes (N,) they predict on test.

    Folders that the command did not ask for are read too, so that one table can gather what several commands trained;
    what is no training of this experiment is left out.
    """
    device = device_of(run)
    found = []

    def add(split: str, model: str, trial: int, recipe: Recipe, load: Callable, cached: Path, accuracy: list) -> None:
        if not cached.exists():
            print(f"testing {model}, trial {trial}, split by {split}", flush=True)
            net = load().to(device, memory_format=channels_last)
            dataset = lung_pictures(recipe, run, "test", task=MANET)
            predicted = classify.predict(net, dataset, device).argmax(1)
            cached.parent.mkdir(parents=True, exist_ok=True)
            np.save(cached, predicted[dataset.labels >= 0])  # those of one certain class
        found.append(dict(split=split, model=model, trial=trial, recipe=recipe, accuracy=accuracy,
                          predicted=np.load(cached), load=load, run=run))  # fmt: skip

    for path in sorted(out.glob("*/*/*/result.json")):
        split, model, trial = path.parent.parts[-3:]
        if split not in ("patient", "image") or model not in list_models() or not trial.isdigit():
            continue
        weights = path.with_name("best.safetensors")
        try:
            recipe = Recipe.of(json.loads(path.read_text(encoding="utf-8"))["settings"])
            accuracy = pd.read_csv(path.with_name("log.csv")).accuracy.to_list()
            cached = path.with_name(f"test-{sha256(weights)[:12]}-{state(run)}.npy")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            print(f"{path.parent} holds no whole training and is left out ({error}).")
            continue
        if (recipe.task, recipe.split, recipe.model, recipe.seed) != (MANET.name, split, model, int(trial)):
            print(f"{path.parent} holds another training than its name says and is left out.")
            continue
        add(split, model, int(trial), recipe, partial(trained_network, model, weights), cached, accuracy)
    for model in shipped:
        if not any(run["model"] == model and run["split"] == "patient" for run in found):
            entry = read_manifest(run.weights).get(model)
            recipe = Recipe.of(entry["training"]["settings"]) if entry else None
            if recipe is None or recipe.task != MANET.name:
                raise SystemExit(
                    f"There are no weights of {model} for the five classes in {run.weights}: leave it out of --shipped."
                )
            cached = out / "shipped" / f"{model}-{entry['sha256'][:12]}-{state(run)}.npy"
            load = partial(load_network, run.weights, model, refitted=False)
            add("patient", model, 0, recipe, load, cached, [])
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
        size = cost["size"] = next(run["recipe"].size for run in runs if run["model"] == model)
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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=list_models(), default=PAPERS_TEN, metavar="MODEL")
    p.add_argument("--trials", type=int, default=3)
    p.add_argument("--split", nargs="+", choices=["patient", "image"], default=["patient", "image"], dest="splits")
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
        help="copy what shows no X-ray there: results/paper, which also fills the table of docs/papers.md",
    )
    add_run_options(p)
    add_options(p, "classify", leave_out=("task", "model", "split", "seed"))
    args = p.parse_args()
    run, out = run_from(args), Path(args.out)
    if not args.report:
        train_missing(trainings(recipe_from(args, "classify"), run, args.models, args.splits, args.trials), args.jobs)
    index = read_index(args.data)
    indices = {"patient": index, "image": split_by_image(index)}
    tested = tested_rows(indices)
    runs = finished_runs(out, run, args.shipped)
    if args.record:
        runs += read_runs(args.record / "runs.json", runs, tested)
    if not runs:
        raise SystemExit(f"There is no finished training below {out}: leave --report away.")
    runs.sort(key=lambda run: (run["split"] == "image", list_models().index(run["model"]), run["trial"]))
    for each in runs:
        rows = tested[each["split"]]
        each["labels"], each["patients"] = rows.label.map(CLASSES.index).to_numpy(), rows.patient.to_numpy()

    results = tables.summarise(runs, indices, args.trials)
    results["costs"] = measure_costs(runs, args.repeats)
    results["segmentation"] = tables.segmentation(measure_masks(args.data, args.weights, "test"))
    results["verdicts"] = tables.verdicts(results)
    for folder in filter(None, (out, args.record)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / "tables.md").write_text(tables.markdown(results), encoding="utf-8")
        figures.validation_curves(runs, folder / "fig10.png")
    if args.record:
        write_runs(args.record / "runs.json", runs, tested)
        write_among_papers(args.record, "paper", tables.claims(results))
    for path in figures.heatmaps(out, [each for each in runs if "load" in each]):
        print(f"{path} shows X-rays: do not publish it unless their licences allow it")
    print(tables.markdown(results))


if __name__ == "__main__":
    run_verb(main)
