"""Teach the pipeline to tell a film that lies wrongly: linear models on the segmenter's features of turned films.

    python -m train.pose --data DATA

shows the segmenter training X-rays upright and with each fault of
`manet_core.pose.FAULTS`, and tilted by up to 30°; fits a logistic regression of
the fault and a ridge regression of the tilt; writes weights/pose.safetensors (no
picture) and names it in the manifest. The limits are those that --share of the
upright validation X-rays keep to. How well it tells is measured by
`train.evidence --only pose`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from scipy.ndimage import rotate
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from manet_core.pose import UPRIGHT, Pose
from manet_core.weights import manifest_path, read_manifest, sha256, write_manifest

from . import run_verb
from .data import Pictures
from .familiarity import read, segment
from .measures.statistics import even_sample
from .measures.study import options

WRONG = {  # how a film comes to have a fault
    "inverted": lambda x: 1 - x,
    "mirrored": lambda x: x[:, ::-1],
    "upside_down": lambda x: x[::-1, ::-1],
    "flipped": lambda x: x[::-1],
    "turned_left": np.rot90,
    "turned_right": lambda x: np.rot90(x, -1),
}
NAMES = (UPRIGHT, *WRONG)
STEEPEST = 30  # degrees
_STRENGTH, _SMOOTHNESS = 0.01, 4000.0  # of the regressions: chosen on the validation split


def tilted(picture: np.ndarray, degrees: float) -> np.ndarray:
    """A picture (S, S), turned anticlockwise; black where there was nothing."""
    return rotate(picture, degrees, reshape=False, order=1)


def variants(pictures: Iterator[np.ndarray], rng: np.random.Generator) -> Iterator[tuple[np.ndarray, str, float]]:
    """Each picture (S, S) upright, with every fault, and tilted: (picture, name, degrees)."""
    for picture in pictures:
        yield picture, UPRIGHT, 0.0
        for name, wrong in WRONG.items():
            yield np.ascontiguousarray(wrong(picture)), name, 0.0
        degrees = float(rng.uniform(-STEEPEST, STEEPEST))
        yield tilted(picture, degrees), "tilted", degrees


def seen(pictures: Iterator[np.ndarray], weights: str | Path, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, C, g, g) of the `variants` of pictures, their names (N,) and degrees (N,)."""
    shown, told = [], []

    def passed() -> Iterator[np.ndarray]:
        for picture, name, degrees in variants(pictures, np.random.default_rng(0)):
            told.append((name, degrees))
            yield picture

    shown = [lungs.features for _, lungs in segment(passed(), weights, what)]
    names, degrees = zip(*told)
    return np.stack(shown), np.array(names), np.array(degrees)


def learn(train: tuple, held_out: tuple, share: float) -> Pose:
    """Fit to what `seen` gives; the limits are those that `share` of the upright of `held_out` keep to."""
    features, names, degrees = train
    flat, faults, level = features.reshape(len(features), -1), names != "tilted", np.isin(names, [UPRIGHT, "tilted"])
    number = np.array([NAMES.index(name) for name in names[faults]])
    of_fault = make_pipeline(StandardScaler(), LogisticRegression(C=_STRENGTH, max_iter=1000)).fit(flat[faults], number)
    of_tilt = make_pipeline(StandardScaler(), Ridge(_SMOOTHNESS)).fit(flat[level], degrees[level])
    rows = [_unscaled(of_fault), _unscaled(of_tilt)]
    weight, bias = (np.concatenate([row[i] for row in rows]).astype(np.float32, order="C") for i in (0, 1))
    pose = Pose(NAMES, weight, bias, limit=0.5, tilted=0.0)
    upright = held_out[0][held_out[1] == UPRIGHT]
    wrong = [1 - pose.read(features)[0][UPRIGHT] for features in upright]
    steep = [abs(pose.tilt(features)) for features in upright]
    limits = [float(np.quantile(values, share)) for values in (wrong, steep)]
    return Pose(NAMES, weight, bias, max(0.5, limits[0]), limits[1])


def _unscaled(fitted) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, D) and bias (K,) of a linear model behind a scaler, for features that are not scaled."""
    scaler, model = fitted[0], fitted[-1]
    weight = np.atleast_2d(model.coef_) / scaler.scale_
    return weight, np.atleast_1d(model.intercept_) - weight @ scaler.mean_


def main() -> None:
    """Fit, and write weights/pose.safetensors."""
    p = options(__doc__)
    p.add_argument("--share", type=float, default=0.99, help="of the upright validation X-rays, to raise no warning")
    p.add_argument(
        "--most", type=int, default=480, help="training X-rays, even over sources; half as many of validation"
    )
    args = p.parse_args()
    models = read_manifest(args.weights)
    pictures = Pictures(args.data, models["resunet"]["preprocessing"]["size"], args.cache)
    sets = {}
    for split, most in (("train", args.most), ("val", args.most // 2)):
        rows = pictures.rows(split)
        rows = rows[even_sample(pictures.index.source.to_numpy()[rows], n=most)]
        sets[split] = seen(read(pictures, rows), args.weights, split)
    pose = learn(sets["train"], sets["val"], args.share)
    segmenter = Path(models["resunet"]["file"]).name  # another segmenter has other features, and another file
    path = manifest_path(args.weights).with_name(segmenter.replace("resunet", "pose"))
    save_file({"weight": pose.weight, "bias": pose.bias}, path)  # which would scramble arrays in Fortran's order
    models["resunet"]["pose"] = {
        "file": path.name,
        "sha256": sha256(path),
        "names": list(pose.names),
        "limit": pose.limit,
        "tilted": pose.tilted,
        "n": int((sets["train"][1] == UPRIGHT).sum()),
    }
    write_manifest(args.weights, models)
    print(f"{path}: told above a probability of {pose.limit:.2f}, and from {pose.tilted:.1f}° of tilt on")


if __name__ == "__main__":
    run_verb(main)
