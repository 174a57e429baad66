"""One analysis on one page: what the command line writes for every picture and what the web page offers to keep."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import BinaryIO

import numpy as np

from .explain import get_explainer
from .networks.registry import human_name
from .pipeline import DISCLAIMER, NO_READING, Analysis
from .preprocess import resize
from .tasks import Task, get_task

COLOUR_MAP = "inferno"  # perceptually uniform and safe for colour-blind readers
_SIDE = 512  # pixels; a report is for looking, not for measuring
_A4 = (8.27, 11.69)  # inches
_SMALL = {"fontsize": 7, "color": "0.3"}
_UPRIGHT = 6  # classes whose names fit on one line of a table; the names of more are turned
# Fonts of other scripts than those of matplotlib's own, of Linux, macOS and Windows; those that are installed are used
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "IPAexGothic", "WenQuanYi Zen Hei", "Hiragino Sans",
    "PingFang SC", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai",
    "Arial Unicode MS",
)  # fmt: skip
_LINE = 0.0105  # height of a line of small print, as a share of the page


def limits(tasks: Iterable[str]) -> str:
    """What a reader must know before believing networks that were asked these tasks."""
    tasks = [get_task(name) for name in tasks]
    said = [*(task.limits for task in tasks), *(task.sources for task in tasks if task.sources)]
    return " ".join([*said, "A heatmap shows where a network looked, not whether it was right."])


def save_report(
    analysis: Analysis,
    path: str | Path | BinaryIO,
    title: str = "",
    note: str = "",
    hashes: dict[str, str] | None = None,
    format: str | None = None,
) -> None:
    """Write one A4 page: the four stages, each network's probabilities and heatmap by task, the warnings, the limits.

    Args:
        analysis: from `Pipeline.analyze`.
        path: of the file to write, whose suffix, .png or .pdf, chooses the format; or an open binary file.
        title: printed on top; give nothing that names a patient unless its reader wants it.
        note: free text of the reader, printed below the title.
        hashes: {model: SHA-256 of its weights}, printed so that the page says what made it.
        format: "png" or "pdf", for an open file.
    """
    from matplotlib.figure import Figure  # not before: no start need wait for it

    from . import __version__  # defined after this module is imported

    figure = Figure(figsize=_A4, dpi=110, facecolor="white")
    text = [fill(_printable(line), 100) for line in (title, note) if line]
    figure.text(0.06, 0.972, "MANet, a second opinion", fontsize=14, weight="bold", va="top")
    figure.text(0.94, 0.97, DISCLAIMER, ha="right", va="top", **_SMALL)
    given = {"family": list(_fonts()), "parse_math": False}  # a file may be called "a$b$.png", which is no mathematics
    figure.text(0.06, 0.948, "\n".join(text), fontsize=8, va="top", **given)
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

    tasks = [get_task(name) for name in analysis.tasks]
    predicted = [fill(headline(analysis, task), 104) for task in tasks] or ["Predicted: nothing, no network was asked"]
    figure.text(0.06, top - 0.21, "\n".join(predicted), fontsize=10, va="top")
    top -= 0.0155 * (len("\n".join(predicted).splitlines()) - 1)
    warnings = "\n".join(fill(f"Warning: {warning}", 125) for warning in analysis.warnings)
    figure.text(0.06, top - 0.232, warnings, fontsize=7.5, va="top", color="#8a4b00")
    top -= 0.25 + 0.011 * (warnings.count("\n") + bool(warnings))

    for task in tasks:
        readings = analysis.readings_of(task.name)
        head = 1 if len(task.classes) <= _UPRIGHT else 4  # rows
        height = 0.017 * (len(readings) + (len(readings) > 1) + head)
        axis = figure.add_axes((0.06, top - height, 0.88, height))
        _table(axis, task, analysis, hashes or {}, head)
        top -= height + 0.008
    small = fill(limits(analysis.tasks), 138)
    bottom = 0.03 + _LINE * (small.count("\n") + 1)
    lines = 2 if len(tasks) == 1 else 3  # of a heatmap's title
    top, gap = top - 0.013 - 0.012 * lines, 0.012 * (lines + 1)
    rows, columns, height = _grid(len(analysis.readings), top - bottom - 0.012, gap)
    grid = figure.add_gridspec(
        rows, columns, left=0.06, right=0.94, top=top, bottom=bottom + 0.012, wspace=0.06, hspace=gap / height
    )
    grouped = [(task, *item) for task in tasks for item in analysis.readings_of(task.name).items()]
    for cell, (task, model, reading) in zip(grid, grouped):
        name = reading.predicted
        said = f"{_words(name)} {reading.probabilities[name]:.0%}" if analysis.reliable else f"for {_words(name)}"
        title = [_title(model), *[task.title][: lines - 2], said]
        axis = figure.add_subplot(cell, anchor="N")
        _show(axis, picture, "\n".join(title), 7.5 if columns < 5 else 6)
        if reading.heatmaps:
            heatmap = analysis.heatmap(model, name, size)
            axis.imshow(heatmap, cmap=COLOUR_MAP, vmin=0, vmax=1, alpha=0.6 * np.minimum(1, 2 * heatmap))
    figure.text(0.06, bottom, small, va="top", **_SMALL)
    heatmaps = f"Heatmaps: {get_explainer(analysis.explainer).title}, each scaled on its own."
    figure.text(0.06, 0.028, f"MANet {__version__}. {heatmaps}", va="top", **_SMALL)
    figure.savefig(path, format=format, metadata={"Title": "MANet"})


@cache
def _fonts() -> dict[str, frozenset[int]]:
    """The installed ones of `_FONTS`, and the characters that each has."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    files = {font.name: font.fname for font in fontManager.ttflist if font.name in _FONTS}
    return {name: frozenset(FT2Font(files[name]).get_charmap()) for name in _FONTS if name in files}


def _printable(text: str) -> str:
    """The text with a box in place of each character that no font here has."""
    return "".join(c if c.isspace() or any(ord(c) in font for font in _fonts().values()) else "□" for c in text)


def _shape(analysis: Analysis) -> tuple[int, int]:
    height, width = analysis.original.shape
    scale = min(1.0, _SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _show(axis, picture: np.ndarray, title: str, fontsize: float = 7.5) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=fontsize, parse_math=False)
    axis.axis("off")


def _grid(count: int, space: float, gap: float) -> tuple[int, int, float]:
    """(rows, columns, height of a row) that show `count` squares largest; heights are shares of the page's."""

    def side(grid: tuple[int, int, float]) -> float:
        return min(grid[2] * _A4[1], 0.88 * _A4[0] / grid[1])

    grids = []
    for columns in range(3, 9):
        rows = max(1, -(-count // columns))
        grids.append((rows, columns, max(0.02, (space - gap * (rows - 1)) / rows)))
    return max(grids, key=side)


def headline(analysis: Analysis, task: Task) -> str:
    """What the networks of a task say, or that it is not to be believed."""
    start = "Predicted" if len(analysis.tasks) == 1 and task.exclusive else task.title
    if not analysis.reliable:
        return f"{start}: {NO_READING}, for the reasons below"
    asked = len(analysis.readings_of(task.name))
    votes = [
        _words(name) + (f" by {count} of {asked}" if asked > 1 else "")
        for name, count in analysis.votes_of(task.name).items()
    ]
    said = ", ".join(votes) or "none"
    if analysis.divided_of(task.name):
        said = f"{NO_READING}: the networks disagree ({said})"
    elif analysis.unsure_of(task.name):
        said = f"{NO_READING}: not sure enough ({said})"
    return f"{start}: {said}"


def _title(model: str) -> str:
    try:
        return ", ".join(human_name(model))
    except ValueError:  # a manifest may call a network as it likes
        return model


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(axis, task: Task, analysis: Analysis, hashes: dict[str, str], head_rows: int) -> None:
    digits, readings = 1 if head_rows == 1 else 0, analysis.readings_of(task.name)
    rows = [
        (model, reading.probabilities, "+".join(part[:8] for part in hashes.get(model, "").split("+")))
        for model, reading in readings.items()
    ]
    if len(readings) > 1:
        rows.append(("mean", analysis.mean_of(task.name), ""))
    cells = [[name, *(f"{p[c]:.{digits}%}" for c in task.classes), weights] for name, p, weights in rows]
    head = [task.title, *map(_words, task.classes), "weights, SHA-256"]
    widths = [0.2, *[0.66 / len(task.classes)] * len(task.classes), 0.14]
    drawn = axis.table(cells, colLabels=head, loc="upper center", colWidths=widths)
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(6)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("0.8")
        cell.set_height((1 if row else head_rows) / (len(rows) + head_rows))
        cell.PAD = 0.03
        cell.get_text().set_parse_math(False)
        of_class = 1 <= column <= len(task.classes)
        if row == 0 and of_class and head_rows > 1:
            cell.get_text().set_rotation(90)
        if not (analysis.reliable and 1 <= row <= len(readings) and of_class):
            continue
        if task.classes[column - 1] in list(readings.values())[row - 1].present:
            cell.set_text_props(weight="bold")
    axis.axis("off")
