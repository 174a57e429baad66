"""What it means when all networks of a task agree and are sure, and how often what they then claim is right.

A network that is alone agrees with itself, and claims what it is sure of.
"""

import numpy as np

from manet_core.tasks import Task, get_task

from .markdown import percent, table
from .statistics import proportion
from .study import NotMeasured, Readings, Study

TITLE = "When all networks agree"
TEXT = """\
*Claimed*: all networks say the same, each with a probability that reaches its operating point; *unanimous*: they say
the same, sure or not; *unsure*: they say the same, and at least one is below its operating point.

*Claims*: what is claimed so. Found: of the X-rays of a class, the share for which it is claimed. Wrongly: of the X-rays
of other classes, the share for which it is claimed. Right: of all X-rays for which it is claimed, the share that are of
that class; it depends on how many X-rays of each class were tested. A label that allows several classes makes each of
them right, and counts in *right* alone."""
SPLITS = ("test", "external")


def agreement(
    predicted: dict[str, np.ndarray],
    sure: dict[str, np.ndarray],
    target: np.ndarray,
    patients: np.ndarray,
    classes: list[str],
) -> dict:
    """How often the majority is right on all X-rays, on those on which all networks agree, and on the rest; claims.

    Args:
        predicted: {network: class numbers (N,)}.
        sure: {network: whether its answer reaches its operating point, (N,) bool}.
        target: which classes each label allows, (N, K); see `Task.target`.
        patients: (N,) names.
        classes: K names.

    Returns:
        {"models", "share_unanimous", "share_claimed", "groups": {"all", "unanimous", "claimed", "unsure", "divided":
        {"n", "accuracy"}}, "claims": {class: {"n", "found"} of its X-rays, {"others", "wrongly"} of those of other
        classes, {"claimed", "right"} of those for which it is claimed}}. What no X-ray can tell is left out.
    """
    answers, rows = np.stack(list(predicted.values())), np.arange(len(target))
    votes = np.stack([(answers == k).sum(0) for k in range(len(classes))])
    majority, same = votes.argmax(0), votes.max(0) == len(answers)
    right, certain = target[rows, majority] == 1, target.sum(1) == 1
    claim = same & np.all([sure[name] for name in predicted], axis=0)
    every = {
        "all": np.ones(len(target), bool),
        "unanimous": same,
        "claimed": claim,
        "unsure": same & ~claim,
        "divided": ~same,
    }
    groups = {}
    for name, inside in every.items():
        if inside.any():
            groups[name] = {"n": int(inside.sum()), "accuracy": proportion(right[inside], patients[inside])}
    claims: dict[str, dict] = {name: {} for name in classes}
    for k, name in enumerate(classes):
        of_class, others, claimed = certain & (target[:, k] == 1), target[:, k] == 0, claim & (majority == k)
        if of_class.any():
            claims[name] |= {"n": int(of_class.sum()), "found": proportion(claimed[of_class], patients[of_class])}
        if others.any():
            claims[name] |= {"others": int(others.sum()), "wrongly": proportion(claimed[others], patients[others])}
        if claimed.any():
            claims[name] |= {"claimed": int(claimed.sum()), "right": proportion(right[claimed], patients[claimed])}
    shares = {"share_unanimous": float(same.mean()), "share_claimed": float(claim.mean())}
    return {"models": list(predicted)} | shares | {"groups": groups, "claims": claims}


def measure(study: Study) -> dict:
    """{task: {split: `agreement`}} on each of `SPLITS`, for each task of which one answer holds."""
    out: dict[str, dict] = {}
    for task, names in study.tasks.items():
        readings = {name: study.read(name) for name in names}
        first: Readings = readings[names[0]]
        for split in SPLITS:
            rows = first.known(split)
            if rows.any():
                predicted = {name: r.predicted[rows] for name, r in readings.items()}
                sure = {name: r.sure[rows] for name, r in readings.items()}
                classes = list(first.task.classes)
                found = agreement(predicted, sure, first.target[rows], first.patients[rows], classes)
                out.setdefault(task, {})[split] = found
    if not out:
        raise NotMeasured("no X-ray has a label of these tasks")
    return out


def lines(evidence: dict) -> list[str]:
    """Two tables: the majority, a row for each task, split and group; claims, a row for each task, split and class."""
    majority, claims = [], []
    for task, splits in evidence["agreement"].items():
        asked: Task = get_task(task)
        for split, found in splits.items():
            start = [asked.title, split]
            majority += [
                [*start, name, group["n"], percent(group["accuracy"])] for name, group in found["groups"].items()
            ]
            for name, claim in found["claims"].items():
                cells = [
                    cell
                    for count, share in (("n", "found"), ("others", "wrongly"), ("claimed", "right"))
                    for cell in ((claim[count], percent(claim[share])) if count in claim else (0, ""))
                ]
                claims.append([*start, name, *cells])
    first = table(["task", "split", "X-rays", "n", "majority right, % (95 % CI)"], majority)
    head = ["task", "split", "claim", "X-rays of the class", "found, % (95 % CI)", "of others", "wrongly, % (95 % CI)"]
    head += ["claims", "right, % (95 % CI)"]
    return [*first, "", TEXT, "", *table(head, claims)] if claims else first
