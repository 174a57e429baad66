"""What a network's heatmaps look like on average: whoever knows it sees what a heatmap tells of one film.

A heatmap that is the same on every film tells nothing of any. The means are of Grad-CAM, of validation X-rays; they are
made by `train.heatmap_means`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .preprocess import resize
from .weights import SEGMENT, fingerprint, load_beside

PART = "heatmaps"  # of a manifest entry
SIDE = 28  # of a mean, pixels


def small(heatmap: np.ndarray) -> np.ndarray:
    """A heatmap (S, S) in [0, 1] at the size of the means, (SIDE, SIDE) float32."""
    return resize(heatmap, SIDE)


def alike(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation of two heatmaps of one shape; None where one of them is the same everywhere."""
    if not (a.std() > 0 and b.std() > 0):
        return None
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@dataclass(frozen=True)
class HeatmapMean:
    """The mean heatmap of one class by one network.

    Attributes:
        mean: (SIDE, SIDE) float32 in [0, 1], in the coordinates of what the network is shown (`Reading.box`).
        films: how many X-rays it is of, those on which the network found any evidence for the class.
        alike: the median of the correlations of their heatmaps with the mean.
    """

    mean: np.ndarray
    films: int
    alike: float


def load_means(weights: str | Path, entries: dict[str, dict]) -> dict[str, dict[str, HeatmapMean]]:
    """{network: {class: its mean}} of a manifest's `entries`; nothing of networks whose means are of other weights.

    Args:
        weights: folder with manifest.json, or a manifest file.
        entries: the manifest's, those of the segmenter among them.

    Raises:
        WeightsError: a file that the manifest names is missing or damaged.
    """
    segmenter = "".join(fingerprint(entry) for entry in entries.values() if entry.get("task") == SEGMENT)
    found = {}
    for name, entry in entries.items():
        known = entry.get(PART, {})
        if known.get("of") != fingerprint(entry) or known.get("segmenter") != segmenter:
            continue
        of, arrays = load_beside(weights, entry, PART)
        found[name] = {
            label: HeatmapMean(mean, of["films"][label], of["alike"][label])
            for label, mean in zip(of["films"], arrays[name].astype(np.float32))
        }
    return found
