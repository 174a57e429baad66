"""The few array operations that training and inference must do alike."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Box = tuple[float, float, float, float]  # (top, left, bottom, right) as shares of height and width
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
SEES = ("lungs", "whole", "outside", "shape", "shuffled", "equalised")  # what may be shown; "lungs" is MANet


def resize(picture: np.ndarray, size: tuple[int, int] | int) -> np.ndarray:
    """Resize (H, W) float32 to `size` (height, width; or one side of a square), antialiased bilinear.

    Aspect ratio is not kept: the networks see squares, as in the paper.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if picture.shape == (height, width):
        return picture.astype(np.float32, copy=False)
    tensor = torch.from_numpy(np.ascontiguousarray(picture, np.float32))[None, None]
    shrinks = height < picture.shape[0] or width < picture.shape[1]
    out = F.interpolate(tensor, (height, width), mode="bilinear", antialias=shrinks)
    return out[0, 0].numpy()


def to_unit_range(picture: np.ndarray) -> np.ndarray:
    """Min–max scale to [0, 1], the segmenter's input (MANet, section 3.1); a constant picture becomes 0."""
    low, high = picture.min(), picture.max()
    return (picture - low) / max(float(high - low), 1e-6)


def unit_range(pictures: Tensor) -> Tensor:
    """`to_unit_range` of each picture of a tensor (B, C, H, W), with a gradient."""
    low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
    return (pictures - low) / (high - low).clamp(min=1e-6)


def segmented_lungs(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Image × mask, then min–max to [−1, 1], the classifiers' input (MANet, section 3.2).

    Args:
        picture: (H, W) float32 in [0, 1].
        mask: (H, W) bool or in [0, 1], of the same size.

    Returns:
        (H, W) float32; −1 everywhere where the mask is empty.
    """
    return to_unit_range(picture * mask).astype(np.float32) * 2 - 1


def network_input(image: np.ndarray, mask: np.ndarray, sees: str, rng: np.random.Generator) -> np.ndarray:
    """What a classifier is shown of an X-ray (S, S) in [0, 1] and its lung mask (S, S): (S, S) float32 in [−1, 1].

    "lungs" is what MANet is about. The next four are controls, which tell how much of an accuracy needs lung tissue:
    the "whole" picture; the "outside", with the lungs blacked out; the mask's "shape" alone; and the lungs
    "shuffled", their pixels put in random places within the mask, which keeps shape and brightness but no texture.
    "equalised" lungs keep the texture instead: each grey level becomes the share of lung pixels that are no brighter,
    so that no film is brighter or harder than another.
    """
    inside = mask > 0
    if sees == "whole":
        return 2 * to_unit_range(image) - 1
    if sees == "outside":
        return segmented_lungs(image, ~inside)
    if sees == "shape":
        return 2 * inside.astype(np.float32) - 1
    if sees == "shuffled":
        image = image.copy()
        image[inside] = rng.permutation(image[inside])
    elif sees == "equalised":
        image = image.copy()
        levels = image[inside]
        image[inside] = np.searchsorted(np.sort(levels), levels, "right") / max(1, len(levels))
    elif sees != "lungs":
        raise ValueError(f"There is no input {sees!r}; choose one of: {', '.join(SEES)}.")
    return segmented_lungs(image, mask)


def lung_box(mask: np.ndarray, margin: float) -> Box:
    """The box around all lung of a mask (H, W) bool, enlarged on each side by `margin` of its height or width.

    Returns:
        (top, left, bottom, right) as shares of height and width, on whole pixels and within the picture;
        (0, 0, 1, 1) where the mask is empty.
    """
    if not mask.any():
        return WHOLE
    bounds = []
    for axis in (1, 0):
        used = np.flatnonzero(mask.any(axis))
        first, last, length = used[0], used[-1] + 1, mask.shape[1 - axis]
        rim = margin * (last - first)
        bounds.append((max(0, np.floor(first - rim)) / length, min(length, np.ceil(last + rim)) / length))
    (top, bottom), (left, right) = bounds
    return float(top), float(left), float(bottom), float(right)


def crop(picture: np.ndarray, box: Box, size: int) -> np.ndarray:
    """What lies in a `lung_box` of a picture (H, W), resized to (size, size) float32, as `resize` does."""
    top, left, bottom, right = _pixels(box, picture.shape)
    return resize(picture[top:bottom, left:right], size)


def paste(picture: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """What `crop` undoes: `picture` resized to fill its box of a picture of `shape` (H, W), float32; 0 around it."""
    if box == WHOLE:
        return resize(picture, shape)
    top, left, bottom, right = _pixels(box, shape)
    whole = np.zeros(shape, np.float32)
    whole[top:bottom, left:right] = resize(picture, (bottom - top, right - left))
    return whole


def _pixels(box: Box, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a box in the pixels of a picture of `shape`: one pixel at least."""
    top, left, bottom, right = np.rint(np.multiply(box, (*shape, *shape))).astype(int)
    top, left = min(top, shape[0] - 1), min(left, shape[1] - 1)
    return top, left, max(bottom, top + 1), max(right, left + 1)


@dataclass(frozen=True)
class View:
    """How an X-ray becomes a classifier's square input.

    Attributes:
        size: side of the input, pixels.
        working: side to which the whole X-ray is brought first.
        crop: rim around the lungs' box that is cut out of that, as a share of the box's sides; None: the whole X-ray
            is shown.
        sees: what is shown of that, of `SEES`.
    """

    size: int
    working: int
    crop: float | None = None
    sees: str = "lungs"

    @classmethod
    def of(cls, settings: dict) -> "View":
        """The view that a manifest entry's `preprocessing`, or a recipe's settings, ask for."""
        size = settings["size"]
        return cls(size, settings.get("working") or size, settings.get("crop"), settings.get("sees", "lungs"))

    def box(self, mask: np.ndarray) -> Box:
        """What is shown of an X-ray with this mask (working, working) bool."""
        return WHOLE if self.crop is None else lung_box(mask, self.crop)

    def cut(self, picture: np.ndarray, box: Box) -> np.ndarray:
        """What lies in the box of a picture (working, working) float32, at (size, size)."""
        return picture if self.crop is None else crop(picture, box, self.size)
