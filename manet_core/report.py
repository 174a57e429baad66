"""One picture of one analysis: the panel that the command line writes."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .pipeline import DISCLAIMER, Analysis
from .preprocess import resize

COLOUR_MAP = "inferno"  # perceptually uniform and safe for colour-blind readers
_SIDE = 512  # pixels; a panel is for looking, not for measuring


def save_panel(analysis: Analysis, path: str | Path, title: str = "") -> None:
    """Write a PNG: the four stages on top, below them each model's probabilities and heatmap.

    Args:
        analysis: from `Pipeline.analyze`.
        path: of the PNG to write.
        title: printed above; give nothing that names a patient.
    """
    height, width = analysis.original.shape
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    picture = resize(analysis.original, size)
    stages = {
        "original": picture,
        "predicted mask": analysis.segmentation.raw_at(size),
        "cleaned mask": analysis.segmentation.at(size),
        "segmented lungs": picture * analysis.segmentation.at(size),
    }
    columns = 4
    rows = 1 + -(-len(analysis.readings) * 2 // columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows + 0.7), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{DISCLAIMER}".strip(), fontsize=10)
    axes = iter(figure.subplots(rows, columns, squeeze=False).ravel())
    for name, stage in stages.items():
        _show(next(axes), stage, name)
    for model, reading in analysis.readings.items():
        heatmap = resize(reading.heatmaps[reading.predicted], size)
        axis = next(axes)
        _show(axis, picture, f"{model}\n{reading.predicted}, {reading.in_lung[reading.predicted]:.0%} in lung")
        axis.imshow(heatmap, cmap=COLOUR_MAP, vmin=0, vmax=1, alpha=0.45)
        _bars(next(axes), reading.probabilities)
    for axis in axes:
        axis.axis("off")
    if analysis.warnings:
        figure.supxlabel("Warning: " + "\n".join(analysis.warnings), fontsize=8)
    figure.savefig(path, format="png")


def _show(axis, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def _bars(axis, probabilities: dict[str, float]) -> None:
    names, values = list(probabilities), list(probabilities.values())
    bars = axis.barh(names, values, height=0.4, color="#0072B2")
    axis.bar_label(bars, [f"{value:.1%}" for value in values], fontsize=8, padding=2)
    for row, name in enumerate(names):
        axis.text(0, row - 0.3, name, fontsize=8)
    axis.set_xlim(0, 1.25)
    axis.invert_yaxis()
    axis.axis("off")
