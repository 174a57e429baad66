"""Is one X-ray in two splits? Patients by their names, pictures by a perceptual hash."""

import numpy as np
import pandas as pd
from scipy.fft import dctn
from skimage.transform import resize

from .study import Study

TITLE = "Splits"


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Signs of the 63 lowest frequencies of a picture (H, W) shrunk to 32×32, against their median: (63,) bool.

    Two files of the same radiograph, in another size, brightness, contrast or compression, differ in few bits.
    """
    small = resize(image, (32, 32), anti_aliasing=True)
    low = dctn(small, norm="ortho")[:8, :8].ravel()[1:]
    return low > np.median(low)


def near_duplicates(images: np.ndarray, index: pd.DataFrame, bits: int, closeness: float = 0.97) -> pd.DataFrame:
    """Pairs of pictures in different splits that are nearly the same: columns a, b (rows), bits, correlation.

    Pairs whose hashes differ in at most `bits` are compared pixel by pixel at 64×64; those correlated by at least
    `closeness` after shrinking count.
    """
    hashes = np.stack([perceptual_hash(image) for image in images]).astype(np.int16)
    small = np.stack([resize(image, (64, 64), anti_aliasing=True).ravel() for image in images])
    small = small - small.mean(1, keepdims=True)
    small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-9)
    split = apart(index).to_numpy()
    found = []
    for a in range(len(hashes)):
        distance = np.abs(hashes[a + 1 :] - hashes[a]).sum(1)
        for b in a + 1 + np.flatnonzero((distance <= bits) & (split[a + 1 :] != split[a])):
            correlation = float(small[a] @ small[b])
            if correlation >= closeness:
                found.append((a, int(b), int(distance[b - a - 1]), correlation))
    return pd.DataFrame(found, columns=["a", "b", "bits", "correlation"])


def apart(index: pd.DataFrame) -> pd.Series:
    """The split of each row, of which a pretraining is a part of the training."""
    return index.split.replace("pretrain", "train")


def crossing_patients(index: pd.DataFrame) -> list[str]:
    """Patients that are in more than one split."""
    splits = apart(index).groupby(index.patient).nunique()
    return sorted(splits.index[splits > 1])


def measure(study: Study) -> dict:
    """Patients and near-duplicates that cross the splits."""
    pictures = study.pictures()
    pairs = near_duplicates(pictures.images, pictures.index, bits=6)
    split, label = apart(pictures.index).to_numpy(), pictures.index.label.to_numpy()
    kinds = [" – ".join(sorted((split[a], split[b]))) for a, b in zip(pairs.a, pairs.b)]
    return {
        "patients_crossing": len(crossing_patients(pictures.index)),
        "near_duplicates": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "of_another_label": int(sum(label[a] != label[b] for a, b in zip(pairs.a, pairs.b))),
        "pictures": len(pictures.index),
    }


def lines(evidence: dict) -> list[str]:
    """In three sentences."""
    found = evidence["splits"]
    pairs = ", ".join(f"{kind}: {n}" for kind, n in found["near_duplicates"].items()) or "none"
    return [
        f"* patients in more than one split: {found['patients_crossing']}",
        f"* near-duplicates across splits, of {found['pictures']} pictures: {pairs}",
        f"* of these with another label: {found['of_another_label']}",
        "",
    ]
