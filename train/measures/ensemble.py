"""What the networks of a task say together: the mean of their probabilities, beside each of them."""

import numpy as np

from manet_core.tasks import get_task

from .classification import read_rows
from .controls import FIGURES, figures
from .external import external
from .groups import by_group, cohorts
from .markdown import code, percent, table
from .statistics import interval
from .study import NotMeasured, Readings, Study

TITLE = "The networks' mean"
TEXT = """\
The mean of the calibrated probabilities of all networks of a task (an ensemble, Lakshminarayanan 2017), beside each of
them, % (95 % CI). *Mean − best*: points above the network that was best on the validation split, by the mean over
classes and sources."""


class Ensemble(Readings):
    """`Readings` whose probabilities need no temperature: those that they are the mean of had theirs."""

    temperature = 1.0


def ensemble(readings: list[Readings]) -> Ensemble:
    """The mean of the probabilities of networks of one task of which one class holds; logits are its logarithm."""
    first = readings[0]
    mean = np.mean([r.probabilities for r in readings], 0)
    return Ensemble(first.task, first.index, np.log(np.maximum(mean, 1e-12)), np.zeros((len(mean), 0), np.float32))


def measure(study: Study) -> dict:
    """{task: {"models", "best", "each": {network: figures}, "minus_best", and of the mean what is measured of a
    network: "figures", "test", "external", "groups"}} of each task with at least two networks; figures as in controls.
    """
    out = {}
    for task, names in study.tasks.items():
        if len(names) < 2:
            continue
        readings = {name: study.read(name) for name in names}
        first = readings[names[0]]
        test, known, val = first.split("test") & first.labelled, first.known("test"), first.known("val")
        if not test.any() or not val.any():
            continue
        mean = ensemble(list(readings.values()))
        each, of_mean = {name: figures(r) for name, r in readings.items()}, figures(mean)
        best = max(names, key=lambda name: by_group(readings[name], val)[0]["mean"]["value"])
        gaps = {key: (v - each[best][key][0], drawn - each[best][key][1]) for key, (v, drawn) in of_mean.items()}
        out[task] = {
            "models": names,
            "best": best,
            "each": {name: {key: interval(*figure) for key, figure in found.items()} for name, found in each.items()},
            "figures": {key: interval(*figure) for key, figure in of_mean.items()},
            "minus_best": {key: interval(*gap) for key, gap in gaps.items()},
            "test": read_rows(mean, test),
            "external": external(mean),
            "groups": {"test": {"cohorts": cohorts(mean, known)}},
        }
    if not out:
        raise NotMeasured("no task has two networks and labelled X-rays of the validation and test splits")
    return out


def lines(evidence: dict) -> list[str]:
    """A table a task: a column for each network, their mean, and what it gains."""
    out = [TEXT, ""]
    for task, found in evidence["ensemble"].items():
        rows = [
            [title, *(percent(f[key]) for f in found["each"].values()), percent(found["figures"][key])]
            + [percent(found["minus_best"][key])]
            for key, title in FIGURES.items()
            if key in found["figures"]
        ]
        head = [f"{get_task(task).title}, n = {found['test']['n']}", *code(found["models"]), "mean"]
        out += table([*head, f"mean − best (`{found['best']}`)"], rows)
    return out
