"""The paper's figures 9 and 10."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from manet_core import CLASSES
from manet_core.explain import DEFAULT, get_explainer
from manet_core.explain.gradcam import scale_maps
from manet_core.networks.registry import split_name
from manet_core.report import COLOUR_MAP
from manet_core.tasks import MANET

from .data import lung_pictures

STYLES = {"": "-", "ma": "--", "nma": "-.", "cbam": ":"}


def validation_curves(runs: list[dict], path: Path) -> None:
    """Fig. 10: validation accuracy by epoch, mean of the trials; a colour a backbone, a dash an attention.

    A training of one epoch has no curve.
    """
    splits = list(dict.fromkeys(run["split"] for run in runs))
    figure = Figure(figsize=(7 * len(splits), 4.5), layout="constrained")
    backbones = list(dict.fromkeys(split_name(run["model"])[0] for run in runs))
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits):
        for model in dict.fromkeys(run["model"] for run in runs if run["split"] == split):
            mine = [r for r in runs if (r["split"], r["model"]) == (split, model)]
            curves = [run["accuracy"] for run in mine if len(run["accuracy"]) > 1]
            if not curves:
                continue
            length = min(len(curve) for curve in curves)
            backbone, attention = split_name(model)
            colour = colormaps["tab10"](backbones.index(backbone))
            mean = 100 * np.mean([curve[:length] for curve in curves], axis=0)
            axes.plot(range(1, length + 1), mean, STYLES[attention], color=colour, label=f"{model} (n = {len(curves)})")
        axes.set(xlabel="epoch", ylabel="validation accuracy, %", title=f"split by {split}")
        axes.locator_params("x", integer=True)
        if axes.lines:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def heatmaps(out: Path, runs: list[dict]) -> Iterator[Path]:
    """Fig. 9: Grad-CAM for the true class, one test X-ray a class, a row for each attention of a backbone.

    The trial of each network that is best on validation; a figure for each backbone and split, written into `out`. They
    show X-rays.
    """
    for split in ("patient", "image"):
        for backbone in dict.fromkeys(split_name(run["model"])[0] for run in runs if run["split"] == split):
            trained = [run for run in runs if run["split"] == split and split_name(run["model"])[0] == backbone]
            best = {}
            for run in sorted(trained, key=lambda run: max(run["accuracy"], default=0.0), reverse=True):
                best.setdefault(run["model"], run)  # of equals, the first trial
            yield _heatmap_grid(out / f"fig9-{backbone}-{split}.png", [best[name] for name in sorted(best)])


def _heatmap_grid(path: Path, runs: list[dict]) -> Path:
    dataset = lung_pictures(runs[0]["recipe"], runs[0]["run"], "test", task=MANET)
    items = {k: int(np.flatnonzero(dataset.labels == k)[0]) for k in range(len(CLASSES)) if (dataset.labels == k).any()}
    figure = Figure(figsize=(2.4 * len(items), 2.5 * (len(runs) + 1)), layout="constrained")
    grid = figure.subplots(len(runs) + 1, len(items), squeeze=False)
    for column, (label, item) in enumerate(items.items()):
        grid[0, column].imshow(dataset.pictures.images[dataset.rows[item]], cmap="gray")
        grid[0, column].set_title(CLASSES[label], fontsize=9)
    for row, run in zip(grid[1:], runs):
        net, dataset = run["load"](), lung_pictures(run["recipe"], run["run"], "test", task=MANET)
        for axes, (label, item) in zip(row, items.items()):
            image, mask, _ = dataset[item]
            with torch.inference_mode():
                features = net.forward_features(image[None], mask[None])
            logits, maps = get_explainer(DEFAULT).function(net, image[None], mask[None], features)
            axes.imshow(image[0], cmap="gray")
            axes.imshow(scale_maps(maps, run["recipe"].size)[label], cmap=COLOUR_MAP, alpha=0.45)
            axes.set_title(f"{run['model']}: {logits.softmax(0)[label]:.0%}", fontsize=8)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
    return path
