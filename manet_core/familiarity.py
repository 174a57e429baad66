"""Is this an X-ray of the kind that the networks know? The Mahalanobis distance of Lee et al. (NeurIPS 2018).

The segmenter looks at the whole picture, so its deepest features tell a chest
X-ray from a photograph, a CT slice, or a film that lies on its side; they are
there before any classifier is asked, whichever classifiers are loaded.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .weights import load_beside


def pooled(features: np.ndarray) -> np.ndarray:
    """Features (C,) or (C, g, g), averaged over the picture: (C,) float64."""
    return features.astype(np.float64).reshape(len(features), -1).mean(1)


@dataclass(frozen=True)
class Familiarity:
    """A Gaussian over the segmenter's pooled deepest features of the training X-rays.

    Attributes:
        mean: (C,) float64.
        precision: (C, C) float64, the inverse of their covariance.
        limit: the distance above which a picture is called unlike them.
        share: the share in [0, 1] of held-out X-rays that lie below the limit.
    """

    mean: np.ndarray
    precision: np.ndarray
    limit: float
    share: float

    @classmethod
    def load(cls, weights: str | Path, entry: dict) -> "Familiarity | None":
        """What the manifest `entry` of a segmenter names beside the manifest; None if it names nothing.

        Raises:
            WeightsError: the file is missing or damaged.
        """
        if (found := load_beside(weights, entry, "familiarity")) is None:
            return None
        known, arrays = found
        return cls(arrays["mean"], arrays["precision"], known["limit"], known["share"])

    def distance(self, features: np.ndarray) -> float:
        """How far features (C,) or (C, g, g) lie from the training X-rays: about 1 for one of them, more for others."""
        gap = pooled(features) - self.mean
        return float(np.sqrt(max(0.0, gap @ self.precision @ gap) / len(gap)))

    def warnings(self, distance: float) -> list[str]:
        """A plain sentence if the distance is over the limit; [] when all is well."""
        if distance <= self.limit:
            return []
        return [
            f"The picture is unlike the X-rays that the networks learnt from (distance {distance:.1f}; "
            f"{self.share:.0%} of theirs are below {self.limit:.1f}): it may be no frontal chest X-ray, or one of "
            "another kind of machine or processing; trust the readings less."
        ]
