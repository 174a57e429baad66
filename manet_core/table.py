"""Many analyses as a table: one row a film and network, for pandas and for CSV."""

import csv
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .pipeline import NO_READING, Analysis

if TYPE_CHECKING:
    import pandas as pd

_BEFORE = ("file", "network", "task", "predicted", "claim", "reliable")
_AFTER = ("lung_area", "distance", "withheld", "warnings", "error")


def to_frame(analyses: Iterable[Analysis], files: Iterable[str] | None = None) -> "pd.DataFrame":
    """A pandas data frame with one row a film and network; see `rows` for its columns.

    Args:
        analyses: of any tasks, as from `Pipeline.analyze_many`.
        files: a name for each of them, in the same order; their numbers from 0 if not given.

    Raises:
        ValueError: there are more or fewer files than analyses.

    Example:
        >>> from manet_core import Pipeline, to_frame
        >>> from manet_core.phantom import phantom
        >>> pipe = Pipeline.load(models=["efficientnet_lite0", "efficientnet_lite0_ma"])
        >>> list(to_frame(pipe.analyze_many([phantom(seed=0)]), ["drawn.png"]).network)
        ['efficientnet_lite0', 'efficientnet_lite0_ma']
    """
    import pandas as pd  # takes a second, and nothing else here needs it

    analyses = list(analyses)
    names = range(len(analyses)) if files is None else files
    found = [row for name, analysis in zip(names, analyses, strict=True) for row in rows(str(name), analysis)]
    classes = [name for row in found for name in row if name not in _BEFORE + _AFTER]
    return pd.DataFrame(found, columns=_columns(classes)[:-1])


def rows(file: str, analysis: Analysis) -> list[dict]:
    """The rows of one film, one for each network, or one without a network where the mask alone was asked for.

    Returns:
        [{"file", "network", "task", "predicted": class or `NO_READING`, "claim": what all networks of the task name or
        `NO_READING`, "reliable": bool, a class: its probability, ..., "lung_area": share of the picture, "distance" or
        None, "withheld" and "warnings": sentences}].
    """
    film = {"lung_area": float(analysis.segmentation.cleaned.mean()), "distance": analysis.distance}
    film |= {"withheld": " ".join(analysis.withheld), "warnings": " ".join(analysis.warnings)}
    start = {"file": file, "reliable": analysis.reliable}
    return [
        start
        | {"network": model, "task": reading.task}
        | {"predicted": ", ".join(reading.present) if analysis.reliable else NO_READING}
        | {"claim": claim_text(analysis, reading.task)}
        | reading.probabilities
        | film
        for model, reading in analysis.readings.items()
    ] or [start | film]


def claim_text(analysis: Analysis, task: str) -> str:
    """`Analysis.claim_of` a task as text: its classes, or `NO_READING`."""
    claim = analysis.claim_of(task)
    return NO_READING if claim is None else ", ".join(claim)


def csv_head(classes: Iterable[str]) -> str:
    """The first line of a CSV file for networks that tell these classes apart; a class may be named twice."""
    return _line(_columns(classes))


def csv_lines(found: list[dict], classes: Iterable[str]) -> str:
    """`rows` as lines of a CSV file; for a file that was not read, a row is {"file", "error"}."""
    return "".join(_line([row.get(key, "") for key in _columns(classes)]) for row in found)


def _columns(classes: Iterable[str]) -> list[str]:
    return [*_BEFORE, *dict.fromkeys(classes), *_AFTER]


def _line(cells: list) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(f"{cell:.4f}" if isinstance(cell, float) else _cell(cell) for cell in cells)
    return out.getvalue()


def _cell(cell):
    return no_formula(cell) if isinstance(cell, str) else cell


def plain(text: str) -> str:
    """A text on one line that a spreadsheet does not take for a formula."""
    return no_formula("".join(character if character.isprintable() else " " for character in text))


def no_formula(text: str) -> str:
    """A text that a spreadsheet does not take for a formula, whatever it begins with, blanks and wide signs too."""
    start = "".join(character for character in text if character.isprintable()).lstrip()[:1]
    return f"'{text}" if text[:1] in tuple("\t\r\n") or start in tuple("=+-@＝＋－＠") else text
