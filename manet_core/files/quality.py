"""Checks of the pixels alone, before any network: constant pictures and noise."""

import numpy as np

from ..preprocess import resize


def picture_warnings(pixels: np.ndarray) -> list[str]:
    """Sentences where a picture (H, W) in [0, 1] cannot be a radiograph: it is constant, or noise."""
    if pixels.max() - pixels.min() < 1e-6:
        return ["The picture has one grey level only; this is no X-ray."]
    small = resize(pixels, 128)
    deviation = small.std()
    if deviation < 0.02:
        return ["The picture has hardly any contrast; this may be no X-ray."]
    # Neighbouring pixels of a radiograph are nearly alike (about 0.05 here); in noise they are independent (1.4).
    roughness = (np.abs(np.diff(small, axis=0)).mean() + np.abs(np.diff(small, axis=1)).mean()) / deviation
    if roughness > 0.6:
        return ["The picture is mostly noise; this may be no X-ray."]
    return []
