"""Teach the pipeline which pictures it knows: a Gaussian over the segmenter's features of the training X-rays.

    python -m train.familiarity --data DATA

writes weights/familiarity.safetensors (a mean and a precision matrix, no
picture) and names it in the manifest. The limit is the distance below which
--share of the validation X-rays lie. How well it tells pictures that are
out-of-distribution is measured by `train.evidence`.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from sklearn.covariance import LedoitWolf
from tqdm import tqdm

from manet_core.familiarity import Familiarity, pooled
from manet_core.lungs import Lungs, predict_lungs
from manet_core.weights import load_network, manifest_path, read_manifest, sha256, write_manifest

from . import run_verb
from .data import Pictures
from .measures.study import options


def segment(pictures: Iterable[np.ndarray], weights: str | Path, name: str) -> Iterator[tuple[np.ndarray, Lungs]]:
    """Each picture (S, S) with its `predict_lungs`; no more than a batch of them is held."""
    entry = read_manifest(weights)["resunet"]
    segmenter = load_network(weights, "resunet", "cuda" if torch.cuda.is_available() else "cpu")
    pictures = iter(tqdm(pictures, name, unit="picture"))
    while batch := list(islice(pictures, 16)):
        yield from zip(batch, predict_lungs(segmenter, batch, entry["preprocessing"]["size"]))


def read(pictures: Pictures, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The pictures at `rows`, (S, S) float32 in [0, 1]."""
    return (pictures.images[row].astype(np.float32) / 255 for row in rows)


def learn(train: np.ndarray, held_out: np.ndarray, share: float) -> Familiarity:
    """Fit the Gaussian to features `train` (N, C); set the limit so that `share` of `held_out` (M, C) lie below it."""
    fitted = LedoitWolf().fit(train.astype(np.float64))
    known = Familiarity(fitted.location_, fitted.precision_, np.inf, share)
    limit = float(np.quantile([known.distance(features) for features in held_out], share))
    return Familiarity(known.mean, known.precision, limit, share)


def main() -> None:
    """Fit, and write weights/familiarity.safetensors."""
    p = options(__doc__)
    p.add_argument("--share", type=float, default=0.98, help="of the validation X-rays, to lie below the limit")
    p.add_argument("--most", type=int, help="training X-rays at most, drawn at random; default: all")
    args = p.parse_args()
    models = read_manifest(args.weights)
    pictures = Pictures(args.data, models["resunet"]["preprocessing"]["size"], args.cache)
    features = {}
    for split in ("train", "val"):
        rows = np.random.default_rng(0).permutation(pictures.rows(split, labelled=True))[: args.most]
        features[split] = np.stack(
            [pooled(lungs.features) for _, lungs in segment(read(pictures, rows), args.weights, split)]
        )
    known = learn(features["train"], features["val"], args.share)
    segmenter = Path(models["resunet"]["file"]).name  # another segmenter has other features, and another file
    path = manifest_path(args.weights).with_name(segmenter.replace("resunet", "familiarity"))
    save_file({"mean": known.mean, "precision": known.precision}, path)
    models["resunet"]["familiarity"] = {
        "file": path.name,
        "sha256": sha256(path),
        "limit": known.limit,
        "share": known.share,
        "n": len(features["train"]),
    }
    write_manifest(args.weights, models)
    print(f"{path}: {args.share:.0%} of {len(features['val'])} validation X-rays lie below {known.limit:.2f}")


if __name__ == "__main__":
    run_verb(main)
