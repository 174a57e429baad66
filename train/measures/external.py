"""External validation: sensitivity on X-rays of hospitals and collections that were neither trained nor tuned on."""

import numpy as np

from .markdown import code, percent, table
from .statistics import proportion
from .study import Readings, Study

TITLE = "External validation"
TEXT = "Sensitivity on external X-rays, % (95 % CI), by what they show and by source. None was trained on."

# labels of the index that belong together; an answer is right if one of them allows it
GROUPS = {
    "COVID-19": ["COVID-19"],
    "tuberculosis": ["Tuberculosis"],
    "adult normals": ["Normal"],
    "adult pneumonia": ["Bacterial pneumonia", "Viral pneumonia", "Pneumonia (unspecified)"],
}


def rows_of(readings: Readings, group: str, source: str = "all") -> tuple[np.ndarray, np.ndarray]:
    """Which X-rays (N,) bool belong to an external group, and which classes (K,) bool are right for them."""
    labels, index = GROUPS[group], readings.index
    allowed = np.any([readings.task.target(label) > 0 for label in labels], 0)
    rows = readings.split("external") & index.label.isin(labels).to_numpy()
    return rows if source == "all" else rows & (index.source == source).to_numpy(), allowed


def external(readings: Readings) -> dict:
    """{group: {"all" or source: {"n", "sensitivity", "predicted"}}} of the groups that are there."""
    out = {}
    for group in GROUPS:
        rows, allowed = rows_of(readings, group)
        if not rows.any() or not allowed.any():
            continue
        out[group] = {}
        for part in ("all", *np.unique(readings.index.source[rows])):
            rows, _ = rows_of(readings, group, part)
            predicted = readings.predicted[rows]
            out[group][part] = {
                "n": len(predicted),
                "sensitivity": proportion(allowed[predicted], readings.patients[rows]),
                "predicted": {name: int((predicted == k).sum()) for k, name in enumerate(readings.task.classes)},
            }
    return out


def measure(study: Study, name: str) -> dict:
    """`external` of a network that gives one answer."""
    readings = study.read(name)
    return {"external": external(readings)} if readings.task.exclusive else {}


def lines(evidence: dict) -> list[str]:
    """One table over all networks; a cell is empty where a network does not know the disease."""
    models = {name: m for name, m in evidence["models"].items() if "external" in m}
    parts = {(g, p): f["n"] for m in models.values() for g, found in m["external"].items() for p, f in found.items()}
    rows = []
    for (group, part), n in parts.items():
        found = [m["external"].get(group, {}).get(part) for m in models.values()]
        cells = [percent(f["sensitivity"]) if f else "" for f in found]
        rows.append([f"**{group}**" if part == "all" else f"{group}: {part}", n, *cells])
    return [TEXT, "", *table(["X-rays", "n", *code(models)], rows)]
