"""Out-of-distribution pictures: are those that are none of ours told from our test split?"""

import importlib.util
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from manet_core import load_xray
from manet_core.familiarity import Familiarity
from manet_core.files.quality import picture_warnings
from manet_core.lungs import mask_warnings
from manet_core.preprocess import resize

from ..familiarity import read, segment
from .markdown import table
from .study import NotMeasured, Study

TITLE = "Out-of-distribution pictures"
TEXT = """\
The distance of a picture's segmenter features from those of the training X-rays, against our test split. The page warns
above a limit. External X-rays are chest X-rays, but not of the kind that the networks were trained on."""
OURS = "our test split"

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


def detection(ours: np.ndarray, others: np.ndarray, limit: float) -> dict[str, float]:
    """AUROC of two sets of distances, what lies over the limit, and the false alarms if 95 % were to be detected."""
    truth = np.r_[np.zeros(len(ours)), np.ones(len(others))]
    return {
        "n": len(others),
        "auroc": float(roc_auc_score(truth, np.r_[ours, others])),
        "detected": float((others > limit).mean()),
        "false_alarms_at_95": float((ours > np.quantile(others, 0.05)).mean()),
    }


def measure(study: Study) -> dict:
    """How well the shipped limit tells test X-rays from other pictures.

    Returns:
        {"limit", "n", "false_alarms", "warned", "sets": {kind: `detection` and "warned"}}; "warned" is the share that
        gets any warning on the page, from the mask and the picture itself too.
    """
    known = Familiarity.load(study.weights, study.manifest["resunet"])
    if known is None:
        raise NotMeasured("the weights do not say what they know: run python -m train.familiarity first")
    pictures = study.pictures()
    test, external = pictures.rows("test", labelled=True), pictures.rows("external")
    spoilable = np.random.default_rng(0).choice(len(test), min(100, len(test)), replace=False)
    sets = {OURS: read(pictures, test), "photographs, CT, MR": packaged_pictures(pictures.size)}
    sets |= spoilt(list(read(pictures, test[spoilable])))
    sources = pictures.index.source.to_numpy()[external]
    sets |= {f"external: {source}": read(pictures, external[sources == source]) for source in np.unique(sources)}
    distances, warned = {}, {}
    for name, images in sets.items():
        far, alarm = [], []
        for picture, lungs in segment(images, study.weights, name):
            far.append(known.distance(lungs.features))
            alarm.append(far[-1] > known.limit or bool(mask_warnings(lungs) or picture_warnings(picture)))
        distances[name], warned[name] = np.array(far), float(np.mean(alarm))
    own = distances.pop(OURS)
    return {
        "limit": known.limit,
        "n": len(own),
        "false_alarms": float((own > known.limit).mean()),
        "warned": warned.pop(OURS),
        "sets": {
            name: detection(own, found, known.limit) | {"warned": warned[name]} for name, found in distances.items()
        },
    }


def lines(evidence: dict) -> list[str]:
    """One row a kind of picture."""
    known = evidence["ood"]
    own = [f"{100 * known[key]:.1f}" for key in ("false_alarms", "warned")]
    rows = [[OURS, known["n"], "", own[0], "", own[1]]]
    for name, f in known["sets"].items():
        shares = [f"{100 * f[key]:.1f}" for key in ("detected", "false_alarms_at_95", "warned")]
        rows.append([name, f["n"], f"{f['auroc']:.3f}", *shares])
    head = ["pictures", "n", "AUROC", "over the limit, %", "false alarms if 95 % were detected, %", "any warning, %"]
    return [TEXT, "", *table(head, rows)]
