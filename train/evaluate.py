"""Measure the shipped weights on a split, with 95 % intervals, and fit their temperatures and operating points.

    python -m train.evaluate --data DATA
    python -m train.evaluate --data DATA --record   # also into manifest, model card and README

Lung masks are compared on each X-ray's own pixels. Intervals are bootstrap
percentiles over 2000 resamplings of patients, not of pictures. The temperature,
without which the pipeline does not read, and the operating point, below whose
probability nothing is claimed, come of the validation split; they are put into the
manifest where there is no temperature, and anew with --record.

--weights may name a manifest, as weights/NAME.json: its figures go to results/NAME.
"""

import argparse
import json
from pathlib import Path

from manet_core.networks.registry import split_name
from manet_core.tasks import get_task
from manet_core.weights import read_manifest, write_manifest

from . import run_verb
from .measures.classification import read_rows
from .measures.findings import findings, findings_table
from .measures.markdown import code, percent, table, write_between
from .measures.segmentation import by_source, masks_table, measure_masks
from .measures.statistics import bootstrap_weights, mean
from .measures.study import Readings, Study, documents, options, results_folder


def evaluate_classifiers(study: Study, split: str) -> dict:
    """Figures of every classifier of one answer, and each attention's difference from its plain network."""
    out: dict[str, dict] = {}
    right: dict[str, tuple[Readings, dict]] = {}
    for task, names in study.tasks.items():
        for name in names:
            readings = study.read(name)
            rows = readings.split(split) & readings.labelled
            if not rows.any():
                continue
            out[name] = {"task": task} | read_rows(readings, rows)
            right[name] = readings, rows
            plain = split_name(name)[0]
            if name != plain and plain in right and study.entries[plain]["task"] == task:
                difference = readings.right[rows].astype(float) - right[plain][0].right[rows]
                out[name]["accuracy_minus_plain"] = mean(difference, bootstrap_weights(readings.patients[rows]))
    return out


def evaluate_findings(study: Study, split: str) -> dict:
    """AUROC of each finding, of every network that says yes or no to each."""
    out = {}
    for name, entry in study.entries.items():
        if not get_task(entry["task"]).exclusive and (readings := study.read(name)).known(split).any():
            out[name] = {"task": entry["task"]} | findings(readings, split)
    return out


def tables(results: dict) -> str:
    """The results as Markdown."""
    lines = masks_table(results["segmentation"])
    models = results["classification"]
    for task in dict.fromkeys(r["task"] for r in models.values()):
        mine = {name: r for name, r in models.items() if r["task"] == task}
        rows = []
        for name, r in mine.items():
            difference = percent(r["accuracy_minus_plain"]) if "accuracy_minus_plain" in r else ""
            rows.append([f"`{name}`", percent(r["accuracy"]), percent(r["macro_f1"]), difference, r["n"]])
        head = ["accuracy, % (95 % CI)", "macro-F1, % (95 % CI)", "accuracy − plain, points", "n"]
        lines += table([get_task(task).title, *head], rows)
        rows = []
        for c, first in next(iter(mine.values()))["per_class"].items():
            cells = [r["per_class"][c] for r in mine.values()]
            figures = [f"{100 * x['sensitivity']:.0f} / {100 * x['specificity']:.0f}" for x in cells]
            rows.append([c, first["n"], *figures])
        lines += table(["sensitivity / specificity, %", "n", *code(mine)], rows)
    findings_of = results.get("findings", {})
    for task in dict.fromkeys(r["task"] for r in findings_of.values()):
        lines += ["AUROC (95 % CI) of each finding:", ""]
        lines += findings_table(task, {name: r for name, r in findings_of.items() if r["task"] == task})
    return "\n".join(lines[:-1]) + "\n"


def fit_on_validation(study: Study, anew: bool) -> None:
    """Put temperatures and operating points into the manifest, where there is no temperature or all of them `anew`."""
    fitted = {
        name: {"temperature": (readings := study.read(name)).temperature, "operating_point": readings.operating_point}
        for name, entry in study.entries.items()
        if anew or "temperature" not in entry
    }
    if fitted:
        entries = read_manifest(study.weights)
        for name, found in fitted.items():
            entries[name] |= found
        write_manifest(study.weights, entries)


def record(results: dict, weights: Path) -> None:
    """Put the figures into the manifest, and the tables between the marks of model card and README."""
    entries = read_manifest(weights)
    entries["resunet"].setdefault("figures", {})[results["split"]] = results["segmentation"]
    for name, figures in (results["classification"] | results["findings"]).items():
        entries[name].setdefault("figures", {})[results["split"]] = figures
    write_manifest(weights, entries)
    for path in documents(weights):
        write_between(path, "evaluation", tables(results))


def main() -> None:
    """Measure, print, and write evaluation.json and .md."""
    p = options(__doc__)
    p.add_argument("--results", type=Path, help="folder; results, or results/NAME for weights/NAME.json, unless given")
    p.add_argument("--split", default="test", choices=["val", "test"])
    p.add_argument("--record", action="store_true", help="write the figures into manifest, model card and README")
    args: argparse.Namespace = p.parse_args()
    study = Study(args.data, args.weights, args.cache)
    results = {
        "split": args.split,
        "segmentation": by_source(measure_masks(args.data, args.weights, args.split)),
        "classification": evaluate_classifiers(study, args.split),
        "findings": evaluate_findings(study, args.split),
    }
    folder = results_folder(args.weights, args.results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(tables(results), encoding="utf-8")
    print(tables(results))
    fit_on_validation(study, args.record)
    if args.record:
        record(results, args.weights)


if __name__ == "__main__":
    run_verb(main)
