"""Films with another finding (effusion, nodule, ...): what do networks say that must choose among their classes?"""

import numpy as np
from scipy.special import logsumexp, softmax

from manet_core.tasks import get_task

from .groups import NIH
from .markdown import number, percent, table
from .statistics import auroc, proportion
from .study import NotMeasured, Readings, Study

TITLE = "Other findings"
OTHER = "Other finding"
TEXT = """\
X-rays of the test split with a finding that is none of the classes. *AUROC*: does a score tell them from X-rays of the
classes, in the whole test split and within one hospital, where nothing but the finding differs? 0.5 is chance.
Uncertainty: 1 − the highest probability. Energy: −log of the sum of exponentiated logits. Disagreement: how far the
networks' probabilities lie from each other (mutual information)."""


def entropy(p: np.ndarray) -> np.ndarray:
    """(...) of probabilities (..., K), in nats."""
    return -(p * np.log(np.maximum(p, 1e-12))).sum(-1)


def disagreement(probabilities: np.ndarray) -> np.ndarray:
    """(N,) of M networks' probabilities (M, N, K): 0 where all say the same."""
    return entropy(probabilities.mean(0)) - entropy(probabilities).mean(0)


def telling(score: np.ndarray, other: np.ndarray, readings: Readings) -> dict:
    """AUROC of a score (N,) for the `other` (N,) bool against X-rays of the classes, test split."""
    test = readings.known("test") | (readings.split("test") & other)
    places = {"all sources": test, "one hospital": test & readings.index.source.isin(NIH).to_numpy()}
    return {
        place: auroc(score[rows], other[rows], readings.patients[rows])
        for place, rows in places.items()
        if 0 < other[rows].sum() < rows.sum()
    }


def measure(study: Study) -> dict:
    """{task: {"n", "patients", "models": {network: {"normal", "predicted", "auroc"}}}}.

    With several networks also "auroc" of their disagreement, and "claimed": {"any", "Normal"}, the share for which they
    claim any class, and Normal.
    """
    out = {}
    for task, names in study.tasks.items():
        readings = {name: study.read(name) for name in names}
        first = next(iter(readings.values()))
        other = (first.index.label == OTHER).to_numpy()
        rows = first.split("test") & other
        if not rows.any():
            continue
        models = {}
        for name, r in readings.items():
            scores = {"uncertainty": 1 - softmax(r.logits, 1).max(1), "energy": -logsumexp(r.logits, 1)}
            models[name] = {
                "normal": proportion(np.array(r.task.classes)[r.predicted[rows]] == "Normal", r.patients[rows]),
                "predicted": {c: int((r.predicted[rows] == k).sum()) for k, c in enumerate(r.task.classes)},
                "auroc": {score: telling(values, other, r) for score, values in scores.items()},
            }
        out[task] = {"n": int(rows.sum()), "patients": len(np.unique(first.patients[rows])), "models": models}
        if len(names) > 1:
            apart = disagreement(np.stack([r.probabilities for r in readings.values()]))
            out[task]["auroc"] = {"disagreement": telling(apart, other, first)}
            said, sure = (np.stack([getattr(r, of)[rows] for r in readings.values()]) for of in ("predicted", "sure"))
            claim, patients = (said == said[0]).all(0) & sure.all(0), first.patients[rows]
            normal = claim & (np.array(first.task.classes)[said[0]] == "Normal")
            out[task]["claimed"] = {"any": proportion(claim, patients), "Normal": proportion(normal, patients)}
    if not out:
        raise NotMeasured(f"no test X-ray is labelled {OTHER!r}")
    return out


def lines(evidence: dict) -> list[str]:
    """For each task what they are read as, and which score tells them."""
    out = [TEXT, ""]
    for task, found in evidence["other_findings"].items():
        classes = get_task(task).classes
        rows = [
            [f"`{name}`", percent(m["normal"]), *(m["predicted"][c] for c in classes)]
            for name, m in found["models"].items()
        ]
        head = [f"{get_task(task).title}, n = {found['n']}", "read as Normal, % (95 % CI)", *classes]
        out += table(head, rows)
        if "claimed" in found:
            shares = ", ".join(f"{what} for {percent(share)} %" for what, share in found["claimed"].items())
            out += [f"Claimed by all networks together (*When all networks agree*): {shares}.", ""]
        scores = [(f"`{name}`: {score}", f) for name, m in found["models"].items() for score, f in m["auroc"].items()]
        scores += [(f"{len(found['models'])} networks: {score}", f) for score, f in found.get("auroc", {}).items()]
        places = list(dict.fromkeys(place for _, f in scores for place in f))
        rows = [[what, *(number(f[place], 2) if place in f else "" for place in places)] for what, f in scores]
        out += table(["AUROC (95 % CI)", *(f"{place}" for place in places)], rows)
    return out
