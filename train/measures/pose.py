"""Films that lie wrongly, are negatives or tilted: are they told, and are upright ones left alone?"""

import numpy as np

from manet_core.pose import FAULTS, UPRIGHT, Pose

from ..familiarity import read
from ..pose import seen
from .markdown import percent, table
from .statistics import even_sample, proportion
from .study import NotMeasured, Study

TITLE = "Films that lie wrongly"
TEXT = """\
X-rays, even over sources, as they are and spoilt. Told: the page names this very fault. Another: it names another one.
Tilts were drawn evenly from −30° to 30°; the error is the mean of |found − true|."""
SPLITS = ("test", "external")


def of_split(pose: Pose, features: np.ndarray, names: np.ndarray, degrees: np.ndarray, patients: np.ndarray) -> dict:
    """What `pose` says of what `train.pose.seen` gives of N X-rays (8 N features) with patients (N,).

    Returns:
        {"n", "faults": {name: {"told", "another"}}, "tilt": {"error" in degrees, "upright" (share that is told),
        "steep" (share told of those tilted by 12° and more), "steep_n"}}.
    """
    found = np.array([pose.fault(f) or UPRIGHT for f in features])
    faults = {}
    for name in (UPRIGHT, *FAULTS):
        said = found[names == name]
        another = proportion((said != name) & (said != UPRIGHT), patients)
        faults[name] = {"told": proportion(said == name, patients), "another": another}
    at, level = names == "tilted", names == UPRIGHT
    tilts = np.array([pose.tilt(f) for f in features])
    steep = np.abs(degrees[at]) >= 12
    tilt = {
        "error": float(np.abs(tilts[at] - degrees[at]).mean()),
        "upright": proportion(np.abs(tilts[level]) > pose.tilted, patients),
        "steep_n": int(steep.sum()),
    }
    if steep.any():
        tilt["steep"] = proportion((np.abs(tilts[at]) > pose.tilted)[steep], patients[steep])
    return {"n": len(patients), "faults": faults, "tilt": tilt}


def measure(study: Study) -> dict:
    """{split: `of_split`} of each of `SPLITS`."""
    pose = Pose.load(study.weights, study.manifest["resunet"])
    if pose is None:
        raise NotMeasured("the weights know nothing of it: run python -m train.pose first")
    pictures, out = study.pictures(), {}
    for split in SPLITS:
        rows = pictures.rows(split)
        if len(rows):
            rows = rows[even_sample(pictures.index.source.to_numpy()[rows], n=study.disturbed)]
            patients = pictures.index.patient.to_numpy()[rows]
            out[split] = of_split(pose, *seen(read(pictures, rows), study.weights, split), patients)
    if not out:
        raise NotMeasured("there is no X-ray of the test split, and no external one")
    return out


def lines(evidence: dict) -> list[str]:
    """One row a fault, and two for the tilt."""
    found = evidence["pose"]
    head = [
        "X-rays",
        *(f"{split}, n = {f['n']}: {what}, %" for split, f in found.items() for what in ("told", "another")),
    ]
    rows = []
    for name in (UPRIGHT, *FAULTS):
        cells = []
        for f in found.values():
            told, another = (percent(f["faults"][name][key]) for key in ("told", "another"))
            cells += ["", another] if name == UPRIGHT else [told, another]
        rows.append([name.replace("_", " "), *cells])
    for key, name in (("upright", "upright: tilt told"), ("steep", "tilted by 12° and more: tilt told")):
        rows.append(
            [name, *(c for f in found.values() for c in (percent(f["tilt"][key]) if key in f["tilt"] else "", ""))]
        )
    errors = "; ".join(f"{split} {f['tilt']['error']:.1f}°" for split, f in found.items())
    return [TEXT, "", *table(head, rows), f"Mean error of the tilt: {errors}.", ""]
