"""Sensitivity by class and source: a class that is read well in one hospital only is not read well."""

import numpy as np

from ..sources import people_of
from .markdown import code, percent, table
from .statistics import bootstrap_weights, group_means, interval, proportion
from .study import SPLITS, NotMeasured, Readings, Study

TITLE = "Sensitivity by class and source"
TEXT = """\
Sensitivity of each class in each source, % (95 % CI). Where the label allows several classes (unspecified pneumonia:
bacterial or viral), each of them is right. The mean over groups weighs every class of every source alike of which there
are at least ten patients, the mean over classes every class. *Read as*: share of X-rays with a right class, for
pneumonia any pneumonia; specificity: share that is read neither as COVID-19 nor as tuberculosis. Films of NIH, under
three names, are new films of a hospital of the training data, not external ones."""

NIH = ("nih", "nih_more", "rsna_normal")  # one hospital under three names
PNEUMONIA = ("Bacterial pneumonia", "Viral pneumonia", "Pneumonia (unspecified)")
# name: (labels, whether a source belongs to it)
COHORTS = {
    "adult normals, NIH": (("Normal",), lambda source: source in NIH),
    "adult normals, all": (("Normal",), lambda source: people_of(source) == "adults"),
    "adult pneumonia, NIH": (PNEUMONIA, lambda source: source in NIH),
    "adult pneumonia, all": (PNEUMONIA, lambda source: people_of(source) == "adults"),
    "normal children": (("Normal",), lambda source: people_of(source) == "children"),
    "children with pneumonia": (PNEUMONIA, lambda source: people_of(source) == "children"),
}
ELSE = ("COVID-19", "Tuberculosis")  # what a healthy person must not be told
LEAST = 10  # patients of a group, below which it does not count in the mean over groups; all do where all are smaller


def by_group(readings: Readings, rows: np.ndarray) -> tuple[dict, np.ndarray]:
    """Sensitivities of the rows (N,) bool, and the mean over groups and over classes for each replicate, (R, 2).

    Returns:
        {"n", "patients", "groups": [{"label", "source", "n", "patients", "sensitivity", "predicted"}], "mean",
        "classes": {class: sensitivity, with "n"}, "class_mean"}; classes from X-rays with one allowed class.
    """
    index, task = readings.index[rows], readings.task
    right, predicted, patients = (array[rows] for array in (readings.right, readings.predicted, readings.patients))
    weights = bootstrap_weights(patients)
    pairs = sorted(set(zip(index.label, index.source)), key=lambda pair: (tuple(-task.target(pair[0])), pair))
    members = np.stack([((index.label == label) & (index.source == s)).to_numpy() for label, s in pairs], 1)
    groups = [
        {
            "label": label,
            "source": source,
            "n": int(inside.sum()),
            "patients": len(np.unique(patients[inside])),
            "sensitivity": proportion(right[inside], patients[inside]),
            "predicted": {name: int((predicted[inside] == k).sum()) for k, name in enumerate(task.classes)},
        }
        for (label, source), inside in zip(pairs, members.T)
    ]
    of_class = np.stack([readings.labelled[rows] & (readings.truth[rows] == k) for k in range(len(task.classes))], 1)
    there = of_class.any(0)
    enough = np.array([group["patients"] >= LEAST for group in groups])
    values, drawn = group_means(right.astype(float), members[:, enough if enough.any() else ~enough], weights)
    class_values, class_drawn = group_means(right.astype(float), of_class[:, there], weights)
    names = [name for name, any_ in zip(task.classes, there) if any_]
    means = np.stack([drawn.mean(1), class_drawn.mean(1)], 1)  # NaN where a draw has nobody of a group
    return {
        "n": int(rows.sum()),
        "patients": len(np.unique(patients)),
        "groups": groups,
        "mean": interval(values.mean(), means[:, 0]),
        "classes": {
            name: proportion(right[inside], patients[inside]) | {"n": int(inside.sum())}
            for name, inside in zip(names, of_class[:, there].T)
        },
        "class_mean": interval(class_values.mean(), means[:, 1]) if len(names) else None,
    }, means


def cohorts(readings: Readings, rows: np.ndarray) -> dict:
    """{cohort: {"n", "patients", "read_as", "specificity" (of normals), "predicted"}} of the rows (N,) bool."""
    task, index, out = readings.task, readings.index, {}
    guilty = [k for k, name in enumerate(task.classes) if name in ELSE]
    for name, (labels, belongs) in COHORTS.items():
        allowed = np.any([task.target(label) > 0 for label in labels], 0)
        at = rows & index.label.isin(labels).to_numpy() & index.source.map(belongs).to_numpy(bool)
        if not at.any() or not allowed.any():
            continue
        predicted, patients = readings.predicted[at], readings.patients[at]
        out[name] = {
            "n": int(at.sum()),
            "patients": len(np.unique(patients)),
            "read_as": proportion(allowed[predicted], patients),
            "predicted": {c: int((predicted == k).sum()) for k, c in enumerate(task.classes)},
        }
        if labels == ("Normal",) and guilty:
            out[name]["specificity"] = proportion(~np.isin(predicted, guilty), patients)
    return out


def measure(study: Study, name: str) -> dict:
    """`by_group` and `cohorts` on each of `SPLITS`."""
    readings = study.read(name)
    if not readings.task.exclusive:
        return {}
    out = {}
    for split in SPLITS:
        rows = readings.known(split)
        if rows.any():
            out[split] = by_group(readings, rows)[0] | {"cohorts": cohorts(readings, rows)}
    if not out:
        raise NotMeasured("no X-ray has a label of this task")
    return {"groups": out}


def lines(evidence: dict) -> list[str]:
    """A table a split."""
    models = {name: m["groups"] for name, m in evidence["models"].items() if "groups" in m}
    out = [TEXT, ""]
    for split in SPLITS:
        found = {name: groups[split] for name, groups in models.items() if split in groups}
        if not found:
            continue
        keyed = {name: {(g["label"], g["source"]): g for g in f["groups"]} for name, f in found.items()}
        rows = []
        for key, n in {key: g["n"] for of in keyed.values() for key, g in of.items()}.items():
            cells = [percent(of[key]["sensitivity"]) if key in of else "" for of in keyed.values()]
            rows.append([f"{key[0]}: {key[1]}", n, *cells])
        n = next(iter(found.values()))["n"]
        rows.append(["**mean over groups**", n, *(percent(f["mean"]) for f in found.values())])
        means = [percent(f["class_mean"]) if f["class_mean"] else "" for f in found.values()]
        rows.append(["**mean over classes**", "", *means])
        rows += _cohort_rows(found)
        out += [f"### {split}", "", *table(["X-rays", "n", *code(found)], rows)]
    return out


def _cohort_rows(found: dict[str, dict]) -> list[list]:
    rows = []
    for cohort, n in {c: f["n"] for groups in found.values() for c, f in groups["cohorts"].items()}.items():
        for what, said in (("read_as", "read as labelled"), ("specificity", "specificity, COVID-19 + tuberculosis")):
            figures = [groups["cohorts"].get(cohort, {}).get(what) for groups in found.values()]
            if any(figures):
                rows.append([f"*{cohort}*: {said}", n, *(percent(f) if f else "" for f in figures)])
    return rows
