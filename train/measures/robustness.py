"""Small harmless changes of an X-ray that should change no answer; the mask is predicted anew after each."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from skimage.transform import rotate
from tqdm import tqdm

from manet_core import Pipeline
from manet_core.files.xray import XRay
from manet_core.preprocess import View, resize

from .markdown import code, percent, table
from .statistics import bootstrap_weights, mean
from .study import SPLITS, NotMeasured, Study

TITLE = "Robustness"


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """A picture (H, W) in [0, 1] after 8-bit JPEG at `quality`."""
    file = io.BytesIO()
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def marker(picture: np.ndarray) -> np.ndarray:
    """A side marker, a white L on black, pasted into the upper right corner (the patient's left)."""
    height, width = picture.shape
    side = max(8, height // 10)
    label = Image.new("L", (side, side))
    ImageDraw.Draw(label).text((side // 4, 0), "L", fill=255, font_size=0.9 * side)
    out = picture.copy()
    out[side // 2 : side // 2 + side, width - 2 * side : width - side] = np.asarray(label, np.float32) / 255
    return out


def contrast(picture: np.ndarray, factor: float) -> np.ndarray:
    """Distances from the mean grey multiplied by `factor`, clipped to [0, 1]."""
    mean = picture.mean()
    return np.clip(mean + (picture - mean) * factor, 0, 1)


# Each takes a picture (H, W) float32 in [0, 1] and gives another of the same size and range.
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "rotated by 15°": lambda x: rotate(x, 15),
    "rotated by −15°": lambda x: rotate(x, -15),
    "brightness +30 %": lambda x: np.clip(x * 1.3, 0, 1),
    "brightness −30 %": lambda x: x * 0.7,
    "contrast +30 %": lambda x: contrast(x, 1.3),
    "contrast −30 %": lambda x: contrast(x, 0.7),
    "JPEG, quality 30": lambda x: jpeg(x, 30),
    "shrunk to 112 pixels": lambda x: resize(resize(x, 112), x.shape),
    "Gaussian noise, σ = 0.05": lambda x: np.clip(x + np.random.default_rng(0).normal(0, 0.05, x.shape), 0, 1),
    "a side marker pasted in": marker,
}


def measure(study: Study) -> dict:
    """Accuracy of each network on a random sample of the test split under each of `CHANGES`.

    Each X-ray is brought to the largest side that a network starts from, changed, and then goes through the whole
    pipeline: mask, crop, classification.

    Returns:
        {"n", "pixels", "changes": {change: {network: accuracy, and "minus none", the change on the same X-rays}}}.
    """
    names = [name for names in study.tasks.values() for name in names]
    if not names:
        raise NotMeasured("no network gives one answer")
    readings = {name: study.read(name) for name in names}
    index = readings[names[0]].index
    labelled = np.any([r.split("test") & r.labelled for r in readings.values()], 0)
    at = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(labelled))[: study.disturbed])
    if not len(at):
        raise NotMeasured("no test X-ray has a label of one class")
    pixels = max(View.of(study.entries[name]["preprocessing"]).working for name in names)
    pictures = study.pictures(pixels)
    rows = pictures.rows(*SPLITS)[at]
    weights = bootstrap_weights(index.patient.to_numpy()[at])
    pipe = Pipeline.load(study.weights, names, study.device)
    out, undisturbed = {}, {}
    for what, change in tqdm(CHANGES.items(), "changes"):
        films = (XRay(np.asarray(change(pictures.images[row].astype(np.float32) / 255), np.float32)) for row in rows)
        answers = [
            {name: a.readings[name].predicted for name in names} for a in pipe.analyze_many(films, heatmaps=False)
        ]
        out[what] = {}
        for name, r in readings.items():
            predicted = np.array([r.task.classes.index(answer[name]) for answer in answers])
            right = np.where(r.labelled[at], predicted == r.truth[at], np.nan)
            undisturbed.setdefault(name, right)
            out[what][name] = mean(right, weights) | {"minus none": mean(right - undisturbed[name], weights)}
    return {"n": len(at), "pixels": pixels, "changes": out}


def lines(evidence: dict) -> list[str]:
    """One row a change."""
    found = evidence["robustness"]
    models = list(found["changes"]["none"])
    rows = [["accuracy", *(percent(found["changes"]["none"][name]) for name in models)]]
    for change, f in found["changes"].items():
        if change != "none":
            rows.append([change, *(percent(f[name]["minus none"]) for name in models)])
    text = (
        f"{found['n']} test X-rays, chosen by chance, at {found['pixels']} pixels a side; the mask is predicted anew "
        "after each change. Accuracy, %, and how many points each change adds to it."
    )
    return [text, "", *table(["", *code(models)], rows)]
