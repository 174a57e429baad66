"""Augmentations of one X-ray at a time, through albumentations: the paper's, and what was tried beside it."""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # albumentations asks a package index for updates at import

import albumentations as A
import cv2
import numpy as np
from skimage.morphology import convex_hull_object


def augmentation(rotation: float, intensity: bool, kind: str = "paper") -> A.Compose:
    """Shift ±6.25 %, scale ±20 %, rotation ±`rotation`°, each with p = 0.5 (MANet, sections 3.1 and 3.2).

    With `intensity`, brightness and contrast ±20 % as well, on the image alone. The other kinds are not in the paper:
    "robust" adds what another hospital's film may have gone through: another tone curve, a lower resolution, JPEG,
    noise. "style" adds to that the tones and the coarse shading of another source's X-ray, which is given to the
    Compose as `style`, and other proportions of the chest, so that neither tells the class. "masks" is `OtherMask`.
    "flip" is rotation and reflection alone, as for AlexNet with attention.
    """
    if kind == "flip":  # Li, Ma, Yan 2021 name no angle
        turn = A.Affine(rotate=(-15, 15), border_mode=cv2.BORDER_CONSTANT, interpolation=cv2.INTER_LINEAR, p=1)
        return A.Compose([turn, A.HorizontalFlip(p=0.5)])
    move = dict(border_mode=cv2.BORDER_CONSTANT, interpolation=cv2.INTER_LINEAR, p=0.5)
    steps = [
        A.Affine(translate_percent=(-0.0625, 0.0625), **move),
        A.Affine(scale=(0.8, 1.2), keep_ratio=True, **move),
        A.Affine(rotate=(-rotation, rotation), **move),
    ]
    if intensity:
        steps.append(A.RandomBrightnessContrast(0.2, 0.2, p=0.5))
    if kind in ("robust", "style"):
        smooth = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}
        steps += [
            A.RandomGamma((50, 200), p=0.5),
            A.RandomToneCurve(0.3, p=0.3),
            A.CLAHE((1, 4), p=0.2),
            A.Downscale((0.3, 0.9), interpolation_pair=smooth, p=0.4),
            A.ImageCompression(quality_range=(20, 95), p=0.4),
            A.GaussNoise((0.005, 0.08), p=0.4),
        ]
    if kind == "style":
        proportions = {"x": (0.75, 1.3), "y": (0.75, 1.3)}
        steps = [
            A.HistogramMatching(blend_ratio=(0.3, 1.0), metadata_key="style", p=0.5),
            A.FDA(beta_limit=(0, 0.05), metadata_key="style", p=0.3),
            A.Affine(scale=proportions, shear=(-8, 8), **move),
            *steps,
        ]
    if kind == "masks":
        steps.insert(0, OtherMask(p=0.75))
    return A.Compose(steps)


class OtherMask(A.DualTransform):
    """The mask as another annotator might have drawn it: each lung's convex hull, or a rim more or less, or both.

    Annotators of one source leave out the lung behind the heart, those of another include it, and a segmenter follows
    the one whose films a picture looks like: its mask then tells the source, and with it the class.
    """

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Whether to fill the hollows, and how wide a rim to add (to take away, below 0), in 1/64 of the side."""
        return {"hull": self.py_random.random() < 0.5, "rim": self.py_random.randint(-2, 2)}

    def apply(self, img: np.ndarray, **params) -> np.ndarray:
        """The image stays as it is."""
        return img

    def apply_to_mask(self, mask: np.ndarray, hull: bool, rim: int, **params) -> np.ndarray:
        """(S, S) uint8, 0 and 1."""
        if hull:
            mask = convex_hull_object(mask > 0).astype(np.uint8)
        if rim:
            side = 2 * abs(rim) * len(mask) // 64 + 1
            disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
            mask = (cv2.dilate if rim > 0 else cv2.erode)(mask, disc)
        return mask
