"""Measure the shipped weights on a split, with 95 % intervals.

    python -m train.evaluate --data DATA
    python -m train.evaluate --data DATA --record   # also into manifest, model card and README

Lung masks are compared on each X-ray's own pixels. Intervals are bootstrap
percentiles over 2000 resamplings of patients, not of pictures.
"""

import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from manet_core import CLASSES, list_models, load_xray
from manet_core.lungs import predict_lungs
from manet_core.weights import load_network, read_manifest, write_manifest

from .classify import predict
from .data import LungPictures, Pictures, predicted_lungs, read_index
from .segment import intersection_over_union

MASK_GROUPS = {"shenzhen + montgomery": ("shenzhen", "montgomery"), "ieee8023": ("ieee8023",), "kermany": ("kermany",)}


def bootstrap_weights(patients: np.ndarray, replicates: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each row is drawn when patients are drawn with replacement: (replicates, N) float64."""
    _, number = np.unique(patients, return_inverse=True)
    count = number.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), replicates)
    return drawn[:, number].astype(np.float64)


def interval(value: float, replicates: np.ndarray) -> dict[str, float]:
    """{"value", "low", "high"}: a figure and its 95 % percentile interval."""
    low, high = np.nanpercentile(replicates, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Accuracy (...) of confusion matrices (..., K, K), rows the truth."""
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Unweighted mean F1 (...) over the K classes of confusion matrices (..., K, K), rows the truth."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    f1 = 2 * hit / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1e-12)
    return f1.mean(-1)


def confusions(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Confusion matrices (R, K, K) for row weights (R, N), rows the truth."""
    k = len(CLASSES)
    cell = np.eye(k * k)[truth * k + predicted]  # (N, K·K)
    return (weights @ cell).reshape(-1, k, k)


def read_test(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> dict:
    """All figures of one classifier from its probabilities (N, K) on rows with `truth` (N,)."""
    predicted = probabilities.argmax(1)
    (confusion,) = confusions(truth, predicted, np.ones((1, len(truth))))
    drawn = confusions(truth, predicted, weights)
    per_class = {}
    for k, name in enumerate(CLASSES):
        hit, of_class, called = confusion[k, k], confusion[k].sum(), confusion[:, k].sum()
        if of_class in (0, len(truth)):
            continue  # with none or nothing but this class there is no sensitivity, specificity or AUROC
        per_class[name] = {
            "n": int(of_class),
            "sensitivity": float(hit / of_class),
            "specificity": float(1 - (called - hit) / (confusion.sum() - of_class)),
            "auroc": float(roc_auc_score(truth == k, probabilities[:, k])),
        }
    return {
        "n": len(truth),
        "accuracy": interval(accuracy(confusion), accuracy(drawn)),
        "macro_f1": interval(macro_f1(confusion), macro_f1(drawn)),
        "confusion": confusion.astype(int).tolist(),
        "per_class": per_class,
    }


def evaluate_classifiers(args: argparse.Namespace, entries: dict) -> dict:
    """Figures of every classifier in the manifest, and each attention's difference from its plain network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, correct = {}, {}
    for name in (name for name in list_models() if name in entries):
        pictures = Pictures(args.data, entries[name]["preprocessing"]["size"], args.cache)
        rows = pictures.rows(args.split, labelled=True)
        dataset = LungPictures("classify", pictures, rows, predicted_lungs(pictures, args.weights, rows))
        patients = pictures.index.patient.to_numpy()[rows]
        weights = bootstrap_weights(patients)
        print(f"reading {len(rows)} X-rays with {name}", flush=True)
        probabilities = predict(load_network(args.weights, name, device), dataset, device)
        out[name] = read_test(probabilities, dataset.labels, weights)
        out[name]["patients"] = len(np.unique(patients))
        correct[name] = probabilities.argmax(1) == dataset.labels
        plain = name.removesuffix("_ma").removesuffix("_cbam")
        if name != plain and plain in correct:
            difference = correct[name].astype(float) - correct[plain]
            out[name]["accuracy_minus_plain"] = interval(difference.mean(), weights @ difference / weights.sum(1))
    return out


def measure_masks(data: str | Path, weights: str | Path, split: str) -> pd.DataFrame:
    """The rows of `split` that have a mask, with "iou": of the cleaned mask, on the X-ray's own pixels."""
    index = read_index(data)
    index = index[(index.split == split) & (index["mask"] != "")]
    size = read_manifest(weights)["resunet"]["preprocessing"]["size"]
    segmenter = load_network(weights, "resunet", "cuda" if torch.cuda.is_available() else "cpu")
    ious = []
    for image, mask in tqdm(zip(index.image, index["mask"]), "segmenting", len(index), unit="X-ray"):
        truth = np.asarray(Image.open(mask).convert("1"))
        (lungs,) = predict_lungs(segmenter, [load_xray(image).pixels], size)
        ious.append(intersection_over_union(lungs.at(truth.shape)[None], truth[None])[0])
    return index.assign(iou=ious)


def read_masks(rows: pd.DataFrame) -> dict:
    """n, patients, IoU and Dice of the rows that `measure_masks` returned, or of a part of them."""
    weights = bootstrap_weights(rows.patient.to_numpy())
    iou = rows.iou.to_numpy()
    dice = 2 * iou / (1 + iou)
    return {
        "n": len(rows),
        "patients": rows.patient.nunique(),
        "iou": interval(iou.mean(), weights @ iou / weights.sum(1)),
        "dice": interval(dice.mean(), weights @ dice / weights.sum(1)),
    }


def evaluate_segmenter(args: argparse.Namespace) -> dict:
    """IoU and Dice of the cleaned masks against the annotators', by group of sources."""
    index = measure_masks(args.data, args.weights, args.split)
    groups = {group: index[index.source.isin(sources)] for group, sources in MASK_GROUPS.items()}
    return {group: read_masks(rows) for group, rows in groups.items() if len(rows)}


def percent(figure: dict[str, float]) -> str:
    """An interval as "84.1 (81.2–86.9)", in percent."""
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f}–{100 * figure['high']:.1f})"


def tables(results: dict) -> str:
    """The results as Markdown."""
    lines = ["| lungs of | IoU, % (95 % CI) | Dice, % (95 % CI) | n |", "|---|---|---|---|"]
    for group, r in results["segmentation"].items():
        lines.append(f"| {group} | {percent(r['iou'])} | {percent(r['dice'])} | {r['n']} |")
    lines += [
        "",
        "| model | accuracy, % (95 % CI) | macro-F1, % (95 % CI) | accuracy − plain, points | n |",
        "|---|---|---|---|---|",
    ]
    for name, r in results["classification"].items():
        difference = percent(r["accuracy_minus_plain"]) if "accuracy_minus_plain" in r else ""
        lines.append(f"| `{name}` | {percent(r['accuracy'])} | {percent(r['macro_f1'])} | {difference} | {r['n']} |")
    names = list(results["classification"])
    if names:
        lines += [
            "",
            f"| sensitivity / specificity, % | n | {' | '.join(f'`{n}`' for n in names)} |",
            "|---|---|" + "---|" * len(names),
        ]
        for c in results["classification"][names[0]]["per_class"]:
            cells = [results["classification"][n]["per_class"][c] for n in names]
            figures = " | ".join(f"{100 * x['sensitivity']:.0f} / {100 * x['specificity']:.0f}" for x in cells)
            lines.append(f"| {c} | {cells[0]['n']} | {figures} |")
    return "\n".join(lines) + "\n"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks <!-- name --> and <!-- /name --> in a Markdown file."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    path.write_text(re.sub(f"(?s){begin}.*?{end}", lambda _: begin + text + end, path.read_text()))


def record(results: dict, weights: Path) -> None:
    """Put the figures into the manifest, and the tables between the marks of model card and README."""
    entries = read_manifest(weights)
    entries["resunet"]["figures"][results["split"]] = results["segmentation"]
    for name, figures in results["classification"].items():
        entries[name]["figures"][results["split"]] = figures
    write_manifest(weights, entries)
    for path in (weights / "MODEL_CARD.md", weights.parent / "README.md"):
        if path.exists():
            write_between(path, "evaluation", tables(results))


def options(description: str) -> argparse.ArgumentParser:
    """The options of every verb that measures shipped weights."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", default=os.environ.get("MANET_DATA", "data"), help="folder with index.csv; also MANET_DATA"
    )
    p.add_argument("--weights", default="weights", type=Path)
    p.add_argument("--cache", default="runs/cache")
    return p


def main() -> None:
    """Measure, print, and write results/evaluation.json and .md."""
    p = options(__doc__)
    p.add_argument("--out", default="results", type=Path)
    p.add_argument("--split", default="test", choices=["val", "test"])
    p.add_argument("--record", action="store_true", help="write the figures into manifest, model card and README")
    args = p.parse_args()
    entries = read_manifest(args.weights)
    results = {
        "split": args.split,
        "segmentation": evaluate_segmenter(args),
        "classification": evaluate_classifiers(args, entries),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "evaluation.md").write_text(tables(results))
    print(tables(results))
    if args.record:
        record(results, args.weights)


if __name__ == "__main__":
    main()
