"""What it means when all networks of a task agree."""

import numpy as np

from manet_core.tasks import get_task

from .markdown import percent, table
from .statistics import proportion
from .study import NotMeasured, Study

TITLE = "When all networks agree"


def agreement(predicted: dict[str, np.ndarray], truth: np.ndarray, patients: np.ndarray, classes: int) -> dict:
    """How accurate the majority is on all X-rays, on those on which all networks agree, and on the rest.

    Args:
        predicted: {network: class numbers (N,)}.
        truth: class numbers (N,).
    """
    answers = np.stack(list(predicted.values()))
    votes = np.stack([(answers == k).sum(0) for k in range(classes)])
    right, same = votes.argmax(0) == truth, votes.max(0) == len(answers)
    groups = {}
    for name, rows in (("all", np.ones(len(truth), bool)), ("unanimous", same), ("divided", ~same)):
        if rows.any():
            groups[name] = {"n": int(rows.sum()), "accuracy": proportion(right[rows], patients[rows])}
    return {"models": list(predicted), "share_unanimous": float(same.mean()), "groups": groups}


def measure(study: Study) -> dict:
    """`agreement` on the test split, for each task with at least two networks."""
    out = {}
    for task, names in study.tasks.items():
        readings = {name: study.read(name) for name in names}
        first = readings[names[0]]
        rows = first.split("test") & first.labelled
        if len(names) > 1 and rows.any():
            predicted = {name: r.predicted[rows] for name, r in readings.items()}
            out[task] = agreement(predicted, first.truth[rows], first.patients[rows], len(first.task.classes))
    if not out:
        raise NotMeasured("no task has two networks")
    return out


def lines(evidence: dict) -> list[str]:
    """One table; a row for each task and group."""
    rows = [
        [get_task(task).title, name, group["n"], percent(group["accuracy"])]
        for task, found in evidence["agreement"].items()
        for name, group in found["groups"].items()
    ]
    return table(["task", "X-rays", "n", "accuracy of the majority, % (95 % CI)"], rows)
