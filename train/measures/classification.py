"""Accuracy, macro-F1, and of each class sensitivity, specificity and AUROC, where a label names one class."""

import numpy as np
from sklearn.metrics import roc_auc_score

from manet_core.tasks import get_task
from manet_core.weights import fingerprint

from .markdown import code, percent, table
from .statistics import accuracy, bootstrap_weights, confusions, interval, macro_f1
from .study import NotMeasured, Readings, Study

TITLE = "By class"
TEXT = """\
Accuracy and macro-F1, % (95 % CI); of each class sensitivity and specificity, %, and AUROC against the rest. External
X-rays are taken together here. A label that only says "one of these classes" counts in *Sensitivity by class and
source*, not here."""
PLACES = {"test": "test split", "external_pooled": "external validation"}


def read_test(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray, classes: tuple[str, ...]) -> dict:
    """All figures of one classifier from its probabilities (N, K) on rows with `truth` (N,)."""
    predicted = probabilities.argmax(1)
    (confusion,) = confusions(truth, predicted, np.ones((1, len(truth))), len(classes))
    drawn = confusions(truth, predicted, weights, len(classes))
    per_class = {}
    for k, name in enumerate(classes):
        hit, of_class, called = confusion[k, k], confusion[k].sum(), confusion[:, k].sum()
        if of_class in (0, len(truth)):
            continue  # with none or nothing but this class there is no sensitivity, specificity or AUROC
        per_class[name] = {
            "n": int(of_class),
            "sensitivity": float(hit / of_class),
            "specificity": float(1 - (called - hit) / (confusion.sum() - of_class)),
            "auroc": float(roc_auc_score(truth == k, probabilities[:, k])),
        }
    return {
        "n": len(truth),
        "accuracy": interval(accuracy(confusion), accuracy(drawn)),
        "macro_f1": interval(macro_f1(confusion), macro_f1(drawn)),
        "confusion": confusion.astype(int).tolist(),
        "per_class": per_class,
    }


def read_rows(readings: Readings, rows: np.ndarray) -> dict:
    """`read_test` on some rows (N,) bool of a network's readings, with the number of patients."""
    patients = readings.patients[rows]
    found = read_test(
        readings.probabilities[rows], readings.truth[rows], bootstrap_weights(patients), readings.task.classes
    )
    return found | {"patients": len(np.unique(patients))}


def measure(study: Study, name: str) -> dict:
    """Figures on the test split, on each of its sources, and on all external X-rays."""
    readings = study.read(name)
    if not readings.task.exclusive:
        return {}
    test, external = (readings.split(split) & readings.labelled for split in ("test", "external"))
    if not test.any():
        raise NotMeasured("no test X-ray has a label of one class")
    source = readings.index.source.to_numpy()
    return {
        "sha256": fingerprint(study.entries[name]),
        "task": readings.task.name,
        "test": read_rows(readings, test),
        "test_by_source": {s: read_rows(readings, test & (source == s)) for s in np.unique(source[test])},
        **({"external_pooled": read_rows(readings, external)} if external.any() else {}),
    }


def lines(evidence: dict) -> list[str]:
    """A table for each task, and the confusions by source."""
    out = [TEXT, ""]
    models = {name: m for name, m in evidence["models"].items() if "test" in m}
    for task in dict.fromkeys(m["task"] for m in models.values()):
        mine = {name: m for name, m in models.items() if m["task"] == task}
        rows = []
        for key, where in PLACES.items():
            found = [m[key] for m in mine.values() if key in m]
            if len(found) < len(mine):
                continue
            rows.append([f"**{where}: accuracy**", found[0]["n"], *(percent(f["accuracy"]) for f in found)])
            rows.append([f"{where}: macro-F1", found[0]["n"], *(percent(f["macro_f1"]) for f in found)])
            for label, figures in found[0]["per_class"].items():
                of_class = [f["per_class"][label] for f in found]
                cells = [
                    f"{100 * f['sensitivity']:.0f}, {100 * f['specificity']:.0f}, {f['auroc']:.3f}" for f in of_class
                ]
                rows.append([f"{where}: {label}", figures["n"], *cells])
        out += table([get_task(task).title, "n", *code(mine)], rows)
        out += ["What the X-rays of each source are read as, counts.", ""]
        out += ["<details><summary>Confusion by source</summary>", ""]
        out += table(["source", "X-rays", "n", "network", *get_task(task).classes], confusion_by_source(mine))
        out += ["</details>", ""]
    return out


def confusion_by_source(models: dict[str, dict]) -> list[list]:
    """Rows [source, what its X-rays show, n, network, how many are read as each class] of networks of one task."""
    rows = []
    first = next(iter(models.values()))
    classes = get_task(first["task"]).classes
    for source, figures in first["test_by_source"].items():
        for k, label in enumerate(classes):
            if n := sum(figures["confusion"][k]):
                for name, m in models.items():
                    predicted = m["test_by_source"][source]["confusion"][k]
                    rows.append([f"test: {source}", label, n, f"`{name}`", *predicted])
    for group, parts in first.get("external", {}).items():
        for source, figures in parts.items():
            for name, m in models.items():
                predicted = m["external"][group][source]["predicted"].values()
                rows.append([f"external: {source}", group, figures["n"], f"`{name}`", *predicted])
    return rows
