"""One analysis on one page: what the command line writes for every picture and what the web page offers to keep."""

from pathlib import Path
from textwrap import fill
from typing import BinaryIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .networks.registry import human_name
from .pipeline import DISCLAIMER, Analysis
from .preprocess import resize
from .tasks import CLASSES

COLOUR_MAP = "inferno"  # perceptually uniform and safe for colour-blind readers
LIMITS = (
    "The five probabilities of a network sum to 100%: it must choose among five answers. Effusion, pneumothorax, "
    "nodules, heart failure and all else are not among them. The training X-rays tie each class to its source: a high "
    "number may be reading the patient's age or the hospital. A heatmap shows where a network looked, not whether it "
    "was right."
)
_SIDE = 512  # pixels; a report is for looking, not for measuring
_A4 = (8.27, 11.69)  # inches
_SMALL = {"fontsize": 7, "color": "0.3"}


def save_report(
    analysis: Analysis,
    path: str | Path | BinaryIO,
    title: str = "",
    note: str = "",
    hashes: dict[str, str] | None = None,
    format: str | None = None,
) -> None:
    """Write one A4 page: the four stages, each network's probabilities and heatmap, the warnings, the limits.

    Args:
        analysis: from `Pipeline.analyze`.
        path: of the file to write, whose suffix, .png or .pdf, chooses the format; or an open binary file.
        title: printed on top; give nothing that names a patient unless its reader wants it.
        note: free text of the reader, printed below the title.
        hashes: {model: SHA-256 of its weights}, printed so that the page says what made it.
        format: "png" or "pdf", for an open file.
    """
    from . import __version__  # defined after this module is imported

    columns = 3 if len(analysis.readings) < 7 else 5
    rows = max(1, -(-len(analysis.readings) // columns))
    figure = Figure(figsize=_A4, dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    text = [fill(line, 100) for line in (title, note) if line]
    figure.text(0.06, 0.972, "MANet, a second opinion", fontsize=14, weight="bold", va="top")
    figure.text(0.94, 0.97, DISCLAIMER, ha="right", va="top", **_SMALL)
    figure.text(0.06, 0.948, "\n".join(text), fontsize=8, va="top")
    top = 0.935 - 0.0115 * sum(line.count("\n") + 1 for line in text)

    size = _shape(analysis)
    picture = resize(analysis.original, size)
    cleaned = analysis.segmentation.at(size)
    stages = {
        "original": picture,
        "predicted mask": analysis.segmentation.raw_at(size),
        "cleaned mask": cleaned,
        "segmented lungs": picture * cleaned,
    }
    grid = figure.add_gridspec(1, 4, left=0.06, right=0.94, top=top - 0.01, bottom=top - 0.195, wspace=0.06)
    for cell, (name, stage) in zip(grid, stages.items()):
        _show(figure.add_subplot(cell), stage, name)

    votes = ", ".join(f"{name} by {count} of {len(analysis.readings)}" for name, count in analysis.votes.items())
    figure.text(0.06, top - 0.21, f"Predicted: {votes or 'nothing, no network was asked'}", fontsize=10, va="top")
    warnings = "\n".join(fill(f"Warning: {warning}", 125) for warning in analysis.warnings)
    figure.text(0.06, top - 0.232, warnings, fontsize=7.5, va="top", color="#8a4b00")
    top -= 0.25 + 0.011 * (warnings.count("\n") + bool(warnings))

    if analysis.readings:
        height = 0.017 * (len(analysis.readings) + 1)
        _table(figure.add_axes((0.06, top - height, 0.88, height)), analysis, hashes or {})
        top -= height
    grid = figure.add_gridspec(
        rows, columns, left=0.06, right=0.94, top=top - 0.045, bottom=0.085, wspace=0.06, hspace=0.2
    )
    for cell, (model, reading) in zip(grid, analysis.readings.items()):
        backbone, attention = human_name(model)
        name = reading.predicted
        axis = figure.add_subplot(cell, anchor="N")
        _show(axis, picture, f"{backbone}, {attention}\n{name} {reading.probabilities[name]:.0%}")
        heatmap = resize(reading.heatmaps[name], size)
        axis.imshow(heatmap, cmap=COLOUR_MAP, vmin=0, vmax=1, alpha=0.6 * np.minimum(1, 2 * heatmap))
    figure.text(0.06, 0.07, fill(LIMITS, 138), va="top", **_SMALL)
    figure.text(0.06, 0.028, f"MANet {__version__}. Heatmaps: Grad-CAM, each scaled on its own.", va="top", **_SMALL)
    figure.savefig(path, format=format, metadata={"Title": "MANet"})


def _shape(analysis: Analysis) -> tuple[int, int]:
    height, width = analysis.original.shape
    scale = min(1.0, _SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _show(axis, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=7.5)
    axis.axis("off")


def _table(axis, analysis: Analysis, hashes: dict[str, str]) -> None:
    cells = [
        [
            model,
            *(f"{reading.probabilities[name]:.1%}" for name in CLASSES),
            "+".join(part[:8] for part in hashes.get(model, "").split("+")),
        ]
        for model, reading in analysis.readings.items()
    ]
    head = ["network", *CLASSES, "weights, SHA-256"]
    drawn = axis.table(cells, colLabels=head, loc="upper center", colWidths=[0.2, *[0.132] * 5, 0.14])
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(6)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("0.8")
        cell.PAD = 0.03
        reading = row and list(analysis.readings.values())[row - 1]
        if reading and 1 <= column <= 5 and CLASSES[column - 1] == reading.predicted:
            cell.set_text_props(weight="bold")
    axis.axis("off")
