"""Predicted mask, cleaned mask, and what a mask says against the picture it came from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from .networks import runtime
from .preprocess import resize, to_unit_range

SMOOTHING = 1.0  # pixels of the segmenter: standard deviation of the Gaussian that rounds an enlarged outline
SMALLEST_LUNG = 0.01  # share of the picture; smaller objects are removed from a mask


def clean_mask(mask: np.ndarray) -> np.ndarray:
    """Fill all holes, then remove objects of less than 1 % of the picture (MANet, section 3.1).

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) bool.
    """
    from scipy.ndimage import binary_fill_holes  # not before: no start need wait for it
    from skimage.morphology import remove_small_objects

    return remove_small_objects(binary_fill_holes(mask), max_size=int(SMALLEST_LUNG * mask.size))


@dataclass(frozen=True)
class Lungs:
    """A lung mask at the segmenter's size, to be read at any other.

    Attributes:
        probability: (S, S) float32 in [0, 1], as predicted.
        cleaned: (S, S) bool, thresholded at 0.5 and cleaned.
        features: (C, 2, 2) float32, the segmenter's deepest features, averaged over each quarter of the picture; see
            `familiarity` and `pose`.
    """

    probability: np.ndarray
    cleaned: np.ndarray
    features: np.ndarray | None = None

    @classmethod
    def from_probability(cls, probability: np.ndarray, features: np.ndarray | None = None) -> "Lungs":
        """Threshold and clean a predicted mask (S, S)."""
        return cls(probability, clean_mask(probability > 0.5), features)

    def raw_at(self, size: tuple[int, int] | int) -> np.ndarray:
        """The mask as predicted, (H, W) bool, its outline interpolated from the probabilities."""
        return _at(self.probability, size)

    def at(self, size: tuple[int, int] | int) -> np.ndarray:
        """The cleaned mask, (H, W) bool, with the same interpolated outline."""
        if self.cleaned.shape == ((size, size) if isinstance(size, int) else size):
            return self.cleaned
        raw = self.probability > 0.5
        edited = np.where(self.cleaned == raw, self.probability, self.cleaned.astype(np.float32))
        return _at(edited, size)


def _at(probability: np.ndarray, size: tuple[int, int] | int) -> np.ndarray:
    """Where a probability map, brought to `size`, is over a half.

    A network is sure of nearly every pixel: much enlarged as it is, its map would keep the steps of its pixels.
    """
    if np.greater(size, np.multiply(probability.shape, 2)).any():
        from scipy.ndimage import gaussian_filter  # see `clean_mask`

        probability = gaussian_filter(probability, SMOOTHING, mode="nearest")
    return resize(probability, size) > 0.5


def sides(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The patient's right and left lung, each (H, W) bool, of a mask (H, W) bool.

    The cut is where the middle third of the mask holds least lung. A mask that is
    narrower than half the picture is taken for one lung, on the side where it lies.
    """
    columns = mask.sum(0)
    width, used = len(columns), np.flatnonzero(columns)
    if len(used) == 0:
        return mask, mask
    first, last = used[0], used[-1] + 1
    if last - first < width / 2:
        cut = width if first + last < width else 0
    else:
        third = (last - first) // 3
        middle = columns[first + third : last - third]
        cut = first + third + int(np.flatnonzero(middle == middle.min()).mean())
    right = mask.copy()
    right[:, cut:] = False
    return right, mask & ~right


@torch.inference_mode()
def predict_lungs(segmenter: nn.Module, pictures: Sequence[np.ndarray], size: int) -> list[Lungs]:
    """Segment pictures (H, W) in [0, 1], of any shapes, together at the segmenter's input size (a square)."""
    device = next(segmenter.parameters()).device
    images = np.stack([to_unit_range(resize(picture, size)) for picture in pictures])
    logits, deepest = runtime.masks(segmenter, torch.from_numpy(images)[:, None].to(device))
    probabilities = logits[:, 0].float().sigmoid().cpu().numpy()
    features = adaptive_avg_pool2d(deepest.float(), 2).cpu().numpy()
    return [Lungs.from_probability(*lungs) for lungs in zip(probabilities, features)]


def mask_warnings(lungs: Lungs) -> list[str]:
    """Plain sentences where a mask does not look like the lungs of a frontal chest X-ray; [] when all is well.

    The limits lie outside of what 99 % of 480 X-rays from eight sources show.
    """
    from skimage.measure import label, regionprops  # see `clean_mask`

    cleaned, doubt = lungs.cleaned, (lungs.probability > 0.1) & (lungs.probability < 0.9)
    area = cleaned.mean()
    if area < 2 * SMALLEST_LUNG:
        return ["Hardly any lung was found; this may not be a frontal chest X-ray, and the readings mean little."]
    found = []
    if area < 0.1:
        found.append("Little lung was found; this may not be a frontal chest X-ray.")
    if area > 0.6:
        found.append("The lung mask covers most of the picture; this may not be a frontal chest X-ray.")
    left = cleaned[:, : cleaned.shape[1] // 2].sum() / cleaned.sum()
    if not 0.2 < left < 0.8:
        found.append(
            "Lung was found on one side only; check that both lungs are in the picture and the view is frontal."
        )
    pieces = sorted((region.area for region in regionprops(label(cleaned))), reverse=True)
    if sum(pieces[:2]) < 0.85 * sum(pieces):
        found.append(f"The lung mask is in {len(pieces)} pieces; this may not be a frontal chest X-ray.")
    outline = sum(np.abs(np.diff(cleaned.astype(np.int8), axis=axis)).sum() for axis in (0, 1))
    if doubt.sum() > 0.08 * cleaned.sum() or outline > 10.5 * np.sqrt(cleaned.sum()):
        found.append("The lungs' outline is ragged or uncertain; this may not be a frontal chest X-ray.")
    frame = np.concatenate([cleaned[0], cleaned[-1], cleaned[:, 0], cleaned[:, -1]])
    if frame.mean() > 0.12:
        found.append("The lung mask runs out of the picture; lungs may be cut off, or this is not a chest X-ray.")
    if ((lungs.probability > 0.5) ^ cleaned).sum() > 0.25 * cleaned.sum():
        found.append("The predicted mask needed much cleaning; compare it with the picture before trusting the rest.")
    return found


def implausible(lungs: Lungs, warnings: list[str]) -> bool:
    """Whether a mask with these `mask_warnings` is none of a frontal chest X-ray: hardly any lung, or two faults.

    One of 1,066 test X-rays has two faults.
    """
    return lungs.cleaned.mean() < 2 * SMALLEST_LUNG or len(warnings) > 1
