"""Is the film upright, and no negative? Linear models on the segmenter's deepest features.

The features are there before any classifier is asked; averaged over the quarters
of the picture, they still know where something lies. A fault can be mended: the
pixels are turned, mirrored or inverted, and nothing is interpolated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .files.xray import XRay
from .weights import load_beside


@dataclass(frozen=True)
class Fault:
    """A way in which a film can be presented wrongly.

    Attributes:
        told: a plain sentence.
        action: what to do about it, for a button.
        done: the remark on a film that was put right.
        mend: puts pixels (H, W) in [0, 1] right.
        denies: whether no class should be named before it is mended.
    """

    told: str
    action: str
    done: str
    mend: Callable[[np.ndarray], np.ndarray]
    denies: bool = True


FAULTS = {
    "inverted": Fault(
        "The film looks inverted (air bright, bone dark): invert it.", "Invert the film", "The film was inverted here.",
        lambda pixels: 1 - pixels,
    ),
    "mirrored": Fault(
        "The film looks mirrored (the heart on the other side): mirror it, unless it is known to be right, as in situs "
        "inversus or with a shifted heart.",
        "Mirror the film", "The film was mirrored here.", lambda pixels: pixels[:, ::-1], denies=False,
    ),
    "upside_down": Fault(
        "The film looks upside down: turn it.", "Turn the film", "The film was turned by half a turn here.",
        lambda pixels: pixels[::-1, ::-1],
    ),
    "flipped": Fault(
        "The film looks flipped top to bottom: flip it.", "Flip the film", "The film was flipped top to bottom here.",
        lambda pixels: pixels[::-1],
    ),
    "turned_left": Fault(
        "The film looks turned to the left by a quarter: turn it to the right.", "Turn the film to the right",
        "The film was turned to the right by a quarter here.", lambda pixels: np.rot90(pixels, -1),
    ),
    "turned_right": Fault(
        "The film looks turned to the right by a quarter: turn it to the left.", "Turn the film to the left",
        "The film was turned to the left by a quarter here.", np.rot90,
    ),
}  # fmt: skip
UPRIGHT = "upright"


def mended(x: XRay, fault: str) -> XRay:
    """The X-ray with one of `FAULTS` put right, and a remark that says so."""
    of, stored, spacing = FAULTS[fault], x.stored, x.spacing
    pixels = np.ascontiguousarray(of.mend(x.pixels))
    if stored is not None and fault == "inverted":
        stored = replace(stored, inverted=not stored.inverted)
    elif stored is not None:
        stored = replace(stored, levels=np.ascontiguousarray(of.mend(stored.levels)))
    if spacing is not None and fault in ("turned_left", "turned_right"):
        spacing = replace(spacing, rows=spacing.columns, columns=spacing.rows)
    return replace(x, pixels=pixels, stored=stored, spacing=spacing, remarks=(*x.remarks, of.done))


@dataclass(frozen=True)
class Pose:
    """Multinomial logistic regression of the fault, and ridge regression of the tilt.

    Attributes:
        names: K of them, `UPRIGHT` and those of `FAULTS`.
        weight: (K + 1, C·g·g) float32; the last row is that of the tilt.
        bias: (K + 1,) float32.
        limit: the probability in [0, 1] above which a fault is told.
        tilted: degrees of tilt from which on it is told.
    """

    names: tuple[str, ...]
    weight: np.ndarray
    bias: np.ndarray
    limit: float
    tilted: float

    @classmethod
    def load(cls, weights: str | Path, entry: dict) -> "Pose | None":
        """What the manifest `entry` of a segmenter names beside the manifest; None if it names nothing.

        Raises:
            WeightsError: the file is missing or damaged.
        """
        if (found := load_beside(weights, entry, "pose")) is None:
            return None
        known, arrays = found
        return cls(tuple(known["names"]), arrays["weight"], arrays["bias"], known["limit"], known["tilted"])

    def read(self, features: np.ndarray) -> tuple[dict[str, float], float]:
        """The probability of each name, of sum 1, and the degrees of tilt, from features (C, g, g)."""
        *logits, tilt = self.weight @ features.ravel() + self.bias
        shares = np.exp(np.subtract(logits, max(logits)))
        return dict(zip(self.names, (shares / shares.sum()).tolist())), float(tilt)

    def fault(self, features: np.ndarray) -> str | None:
        """Which of `FAULTS` features (C, g, g) show; None where the film is upright, or nothing is sure."""
        found, _ = self.read(features)
        name = max(found, key=found.get)
        return name if name != UPRIGHT and found[name] > self.limit else None

    def tilt(self, features: np.ndarray) -> float:
        """Degrees, from about −30 to 30, by which a film is tilted: positive is anticlockwise."""
        return self.read(features)[1]

    def warnings(self, features: np.ndarray) -> list[str]:
        """A plain sentence on the fault, or else on the tilt; [] when the film is upright."""
        if fault := self.fault(features):
            return [FAULTS[fault].told]
        tilt = self.tilt(features)
        if abs(tilt) <= self.tilted:
            return []
        way = "anticlockwise" if tilt > 0 else "clockwise"
        return [
            f"The film looks tilted {way}, by about {abs(tilt):.0f}°: the readings may differ from an upright film’s."
        ]
