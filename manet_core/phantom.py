"""A synthetic chest: drawn by a few formulas, owned by nobody, for examples and tests.

It shows the pipeline's path and proves nothing about its accuracy.
"""

import numpy as np

from .xray import XRay


def phantom(size: int = 512, seed: int = 0, opacity: float = 0.0) -> XRay:
    """A drawing of a frontal chest X-ray.

    Args:
        size: side of the square picture, in pixels.
        seed: varies proportions and noise.
        opacity: 0 to 1, strength of a round shadow in the lower lung on the picture's left.

    Returns:
        XRay with (size, size) pixels; call `phantom_mask` for its lungs.
    """
    rng = np.random.default_rng(seed)
    y, x = _grid(size)
    lungs = phantom_mask(size, seed)
    body = _ellipse(x, y, 0, 0.25, 0.92, 1.25) * 0.55
    shoulders = _ellipse(x, y, 0, 1.1, 1.05, 0.9) * 0.15
    spine = 0.22 * np.exp(-((x / 0.07) ** 2))
    heart = 0.30 * _ellipse(x, y, 0.12, 0.30, 0.33, 0.36, soft=0.06)
    neck = 0.25 * _ellipse(x, y, 0, -1.0, 0.22, 0.35)
    picture = body + shoulders + spine * (body > 0.1) + heart + neck
    picture -= 0.42 * lungs * (1 - 0.6 * _ellipse(x, y, 0.12, 0.30, 0.33, 0.36, soft=0.06))
    for side in (-1, 1):  # ribs: dark gaps between bright arcs
        arcs = np.sin(22 * (y + 0.35 * (np.abs(x) - 0.45) ** 2 + 0.12 * np.abs(x)))
        picture += 0.05 * np.clip(arcs, 0, 1) * (np.sign(x) == side) * (np.abs(x) < 0.85) * (body > 0.1)
        clavicle = np.abs(y + 0.62 - 0.10 * side * (x - 0.4 * side))
        picture += 0.12 * np.exp(-((clavicle / 0.025) ** 2)) * (np.sign(x) == side) * (np.abs(x) < 0.7) * (np.abs(x) > 0.06)
        vessels = np.exp(-(((x - 0.18 * side) / 0.12) ** 2 + ((y - 0.05) / 0.3) ** 2))
        picture += 0.12 * vessels * lungs
    if opacity:
        picture += 0.40 * opacity * np.exp(-(((x + 0.42) / 0.16) ** 2 + ((y - 0.32) / 0.16) ** 2)) * lungs
    coarse = rng.normal(0, 1, (size // 8 + 1, size // 8 + 1)).repeat(8, 0).repeat(8, 1)[:size, :size]
    picture += 0.008 * coarse + 0.008 * rng.normal(0, 1, picture.shape)
    picture -= picture.min()
    return XRay((picture / picture.max()).astype(np.float32), ("This is a synthetic drawing, not an X-ray of a person.",))


def phantom_mask(size: int = 512, seed: int = 0) -> np.ndarray:
    """The phantom's lungs, (size, size) bool."""
    rng = np.random.default_rng(seed)
    y, x = _grid(size)
    wide, tall = 0.36 * rng.uniform(0.94, 1.06), 0.80 * rng.uniform(0.94, 1.04)
    lungs = np.zeros((size, size), bool)
    for side in (-1, 1):
        outline = _ellipse(x, y, 0.46 * side, 0.02, wide, tall) > 0.5
        diaphragm = y < 0.62 - 0.35 * (np.abs(x - 0.42 * side) / 0.5) ** 2 - (0.06 if side < 0 else 0)
        lungs |= outline & diaphragm & (np.abs(x) > 0.12)
    return lungs


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """y and x from −1 to 1, (size, 1) and (1, size)."""
    line = np.linspace(-1, 1, size)
    return line[:, None], line[None, :]


def _ellipse(x, y, x0, y0, a, b, soft=0.02) -> np.ndarray:
    """1 inside, 0 outside, with a soft edge."""
    r = np.sqrt(((x - x0) / a) ** 2 + ((y - y0) / b) ** 2)
    return 1 / (1 + np.exp((r - 1) / soft))
