"""Teach the pipeline which pictures it knows: a Gaussian over the segmenter's features of the training X-rays.

    python -m train.familiarity --data DATA

writes weights/familiarity.safetensors (a mean and a precision matrix, no
picture) and names it in the manifest. The limit is the distance below which
--share of the validation X-rays lie. How well it tells strangers is measured
by `train.evidence`.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from manet_core import load_xray
from manet_core.familiarity import Familiarity
from manet_core.files.quality import picture_warnings
from manet_core.lungs import Lungs, mask_warnings, predict_lungs
from manet_core.preprocess import resize
from manet_core.weights import load_network, read_manifest, sha256, write_manifest

from .data import Pictures
from .evaluate import options

# Photographs, drawings, microscopy, CT, MR and ultrasound that installed packages bring along: (package, folder, names)
PACKAGED = (
    ("skimage", "data", "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png "
     "color.png grass.png gravel.png horse.png hubble_deep_field.jpg ihc.png microaneurysms.png moon.png "
     "motorcycle_left.png page.png phantom.png retina.jpg rocket.jpg text.png"),
    ("sklearn", "datasets/images", "china.jpg flower.jpg"),
    ("matplotlib", "mpl-data/sample_data", "grace_hopper.jpg"),
    ("gradio", "media_assets/images", "cheetah.jpg groot.jpeg lion.jpg tower.jpg"),
    ("pydicom", "data/test_files", "693_J2KI.dcm CT_small.dcm JPEG2000.dcm MR_small.dcm examples_jpeg2k.dcm "
     "examples_overlay.dcm examples_palette.dcm examples_rgb_color.dcm image_dfl.dcm liver_1frame.dcm"),
)  # fmt: skip


def packaged_pictures(size: int) -> list[np.ndarray]:
    """What is no chest X-ray at all: each of `PACKAGED` whole and in three random cuts, (size, size) in [0, 1].

    Files that an installed version of a package does not bring are left out.
    """
    rng, out = np.random.default_rng(0), []
    for package, folder, names in PACKAGED:
        root = Path(importlib.util.find_spec(package).origin).parent / folder
        for path in (root / name for name in names.split()):
            if not path.is_file():
                continue
            pixels = load_xray(path).pixels
            out.append(resize(pixels, size))
            for _ in range(3):
                height, width = (int(side * rng.uniform(0.5, 0.9)) for side in pixels.shape)
                top, left = (rng.integers(0, side - cut) for side, cut in zip(pixels.shape, (height, width)))
                out.append(resize(pixels[top : top + height, left : left + width], size))
    return out


def spoilt(pictures: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Chest X-rays (S, S) in [0, 1] as nobody should read them."""
    rng = np.random.default_rng(0)

    def cut(x: np.ndarray) -> np.ndarray:
        side = int(0.4 * len(x))
        top, left = rng.integers(0, len(x) - side, 2)
        return resize(x[top : top + side, left : left + side], len(x))

    return {
        "X-rays on their side": [np.rot90(x).copy() for x in pictures],
        "X-rays upside down": [np.rot90(x, 2).copy() for x in pictures],
        "X-rays inverted": [1 - x for x in pictures],
        "X-rays cut to a sixth": [cut(x) for x in pictures],
        "X-rays in heavy noise": [
            np.clip(x + rng.normal(0, 0.3, x.shape), 0, 1).astype(np.float32) for x in pictures
        ],
    }  # fmt: skip


def segment(pictures: list[np.ndarray], weights: str | Path, name: str) -> list[Lungs]:
    """`predict_lungs` with the shipped segmenter, in small batches with a progress bar."""
    entry = read_manifest(weights)["resunet"]
    segmenter = load_network(weights, "resunet", "cuda" if torch.cuda.is_available() else "cpu")
    out = []
    for i in tqdm(range(0, len(pictures), 8), name, unit="batch of 8"):
        out += predict_lungs(segmenter, pictures[i : i + 8], entry["preprocessing"]["size"])
    return out


def read(pictures: Pictures, rows: np.ndarray) -> list[np.ndarray]:
    """The pictures at `rows`, (S, S) float32 in [0, 1]."""
    return [pictures.images[row].astype(np.float32) / 255 for row in rows]


def learn(train: np.ndarray, held_out: np.ndarray, share: float) -> Familiarity:
    """Fit the Gaussian to features `train` (N, C); set the limit so that `share` of `held_out` (M, C) lie below it."""
    fitted = LedoitWolf().fit(train.astype(np.float64))
    known = Familiarity(fitted.location_, fitted.precision_, np.inf, share)
    limit = float(np.quantile([known.distance(features) for features in held_out], share))
    return Familiarity(known.mean, known.precision, limit, share)


def telling_apart(ours: list[float], strange: list[float], limit: float) -> dict[str, float]:
    """AUROC of two sets of distances, what the limit catches, and the false alarms if 95 % were to be caught."""
    ours, strange = np.asarray(ours), np.asarray(strange)
    truth = np.r_[np.zeros(len(ours)), np.ones(len(strange))]
    return {
        "n": len(strange),
        "auroc": float(roc_auc_score(truth, np.r_[ours, strange])),
        "caught": float((strange > limit).mean()),
        "false_alarms_at_95": float((ours > np.quantile(strange, 0.05)).mean()),
    }


def measure(data: str | Path, weights: str | Path, cache: str | Path) -> dict:
    """How well the shipped limit tells test X-rays from strangers: {"false_alarms", "n", "strangers": {kind: figures}}.

    "warned" is the share that gets any warning on the page, from the mask and the picture itself too.
    """
    entry = read_manifest(weights)["resunet"]
    known = Familiarity.load(weights, entry)
    if known is None:
        raise SystemExit("The weights do not say what they know: run python -m train.familiarity first.")
    pictures = Pictures(data, entry["preprocessing"]["size"], cache)
    ours = read(pictures, pictures.rows("test", labelled=True))
    external = pictures.rows("external")
    sets = {"our test split": ours, "photographs, CT, MR": packaged_pictures(pictures.size)}
    sets |= spoilt([ours[i] for i in np.random.default_rng(0).choice(len(ours), min(100, len(ours)), replace=False)])
    for source in sorted(pictures.index.source.iloc[external].unique()):
        rows = external[(pictures.index.source.iloc[external] == source).to_numpy()]
        sets[f"other hospitals: {source}"] = read(pictures, rows)
    distances, warned = {}, {}
    for name, images in sets.items():
        lungs = segment(images, weights, name)
        distances[name] = [known.distance(found.features) for found in lungs]
        far = np.array(distances[name]) > known.limit
        other = [bool(mask_warnings(found) or picture_warnings(x)) for found, x in zip(lungs, images)]
        warned[name] = float((far | other).mean())
    own = distances.pop("our test split")
    return {
        "limit": known.limit,
        "n": len(own),
        "false_alarms": float((np.array(own) > known.limit).mean()),
        "warned": warned.pop("our test split"),
        "strangers": {
            name: telling_apart(own, strange, known.limit) | {"warned": warned[name]}
            for name, strange in distances.items()
        },
    }


def main() -> None:
    """Fit, and write weights/familiarity.safetensors."""
    p = options(__doc__)
    p.add_argument("--share", type=float, default=0.98, help="of the validation X-rays, to lie below the limit")
    args = p.parse_args()
    models = read_manifest(args.weights)
    pictures = Pictures(args.data, models["resunet"]["preprocessing"]["size"], args.cache)
    features = {}
    for split in ("train", "val"):
        rows = pictures.rows(split, labelled=True)
        features[split] = np.stack([lungs.features for lungs in segment(read(pictures, rows), args.weights, split)])
    known = learn(features["train"], features["val"], args.share)
    path = args.weights / "familiarity.safetensors"
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
    main()
