"""Do the features know the source? How well a linear probe reads it off them."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .markdown import code, percent, table
from .statistics import bootstrap_weights, group_means, interval
from .study import Study

TITLE = "Do the features know the source?"
LEAST = 10  # X-rays of a source below which it is left out
CARRIERS = {"montgomery": "shenzhen"}  # sources whose films came to us through the same hands


def probe(features: np.ndarray, target: np.ndarray, patients: np.ndarray) -> dict:
    """How well a linear probe reads `target` (N,) off frozen features (N, C): balanced accuracy, chance beside it.

    Five-fold cross-validation; no patient is in two folds.
    """
    folds = GroupKFold(min(5, len(np.unique(patients))))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500, class_weight="balanced"))
    predicted = cross_val_predict(model, features, target, groups=patients, cv=folds)
    kinds = np.unique(target)
    members = np.stack([target == k for k in kinds], 1)
    _, recalls = group_means((predicted == target).astype(float), members, bootstrap_weights(patients, 200))
    counts = {str(k): int((target == k).sum()) for k in kinds}
    value = balanced_accuracy_score(target, predicted)
    return {"balanced_accuracy": interval(value, recalls.mean(1)), "chance": 1 / len(kinds), "n": counts}


def measure(study: Study, name: str) -> dict:
    """On our own sources, and on normals alone, where no disease helps to tell the source."""
    readings = study.read(name)
    if not readings.task.exclusive:
        return {}
    source = readings.index.source.replace(CARRIERS).to_numpy()
    ours = (readings.split("val") | readings.split("test")) & readings.labelled
    normal = (readings.index.label == "Normal").to_numpy()
    found = {}
    for what, rows, kind in (
        ("all classes, our own sources", ours, source),
        ("normals only, all sources", normal, readings.index.source.to_numpy()),
    ):
        kinds, counts = np.unique(kind[rows], return_counts=True)
        rows = rows & np.isin(kind, kinds[counts >= min(LEAST, counts.max(initial=0))])
        if len(np.unique(kind[rows])) > 1:
            found[what] = probe(readings.features[rows], kind[rows], readings.patients[rows])
    return {"source_probe": found}


def lines(evidence: dict) -> list[str]:
    """One row a question."""
    models = {name: m["source_probe"] for name, m in evidence["models"].items() if m.get("source_probe")}
    rows = []
    for what, chance in {what: f["chance"] for m in models.values() for what, f in m.items()}.items():
        cells = [percent(m[what]["balanced_accuracy"]) if what in m else "" for m in models.values()]
        rows.append([what, f"{100 * chance:.0f}", *cells])
    text = "Balanced accuracy of a linear probe, % (95 % CI); at chance, the features do not tell the source."
    return [text, "", *table(["", "chance", *code(models)], rows)]
