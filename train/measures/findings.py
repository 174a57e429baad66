"""AUROC of every finding, for networks that say yes or no to each; only where the label is known."""

import numpy as np

from manet_core.tasks import get_task

from .markdown import code, number, table
from .statistics import auroc
from .study import Study

TITLE = "Findings"
TEXT = "AUROC (95 % CI over patients) on X-rays of the test split whose findings are known; n: how many have it."


def findings(readings, split: str) -> dict:
    """{"n", "mean_auroc", "findings": {class: auroc}}; findings that all or none have are left out."""
    rows = readings.known(split)
    target, scores, patients = readings.target[rows] == 1, readings.logits[rows], readings.patients[rows]
    found = {
        name: auroc(scores[:, k], target[:, k], patients)
        for k, name in enumerate(readings.task.classes)
        if 0 < target[:, k].sum() < len(target)
    }
    mean = float(np.mean([f["value"] for f in found.values()])) if found else None
    return {"n": int(rows.sum()), "patients": len(np.unique(patients)), "mean_auroc": mean, "findings": found}


def measure(study: Study, name: str) -> dict:
    """On the test split."""
    readings = study.read(name)
    if readings.task.exclusive or not readings.known("test").any():
        return {}
    return {"task": readings.task.name, "findings": findings(readings, "test")}


def lines(evidence: dict) -> list[str]:
    """One table a task; nothing without such a network."""
    models = {name: m for name, m in evidence["models"].items() if "findings" in m}
    out = []
    for task in dict.fromkeys(m["task"] for m in models.values()):
        out += findings_table(task, {name: m["findings"] for name, m in models.items() if m["task"] == task})
    return [TEXT, "", *out] if out else []


def findings_table(task: str, found: dict[str, dict]) -> list[str]:
    """The findings of a task in rows, its networks in columns."""
    counts = {c: f["n"] for m in found.values() for c, f in m["findings"].items()}
    rows = [
        [c, n, *(number(m["findings"][c], 2) if c in m["findings"] else "" for m in found.values())]
        for c, n in counts.items()
    ]
    means = [f"{m['mean_auroc']:.2f}" if m["mean_auroc"] is not None else "" for m in found.values()]
    rows.append(["**mean**", next(iter(found.values()))["n"], *means])
    return table([get_task(task).title, "n", *code(found)], rows)
