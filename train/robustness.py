"""Small harmless changes of an X-ray that should change no answer; the mask is predicted anew after each."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.transform import rotate
from torch import nn

from manet_core.lungs import predict_lungs
from manet_core.preprocess import resize, segmented_lungs


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """A picture (H, W) in [0, 1] after 8-bit JPEG at `quality`."""
    file = io.BytesIO()
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def marker(picture: np.ndarray) -> np.ndarray:
    """A side marker, a white L on black, pasted into the upper right corner (the patient's left)."""
    height, width = picture.shape
    side = max(8, height // 10)
    label = Image.new("L", (side, side))
    ImageDraw.Draw(label).text((side // 4, 0), "L", fill=255, font_size=0.9 * side)
    out = picture.copy()
    out[side // 2 : side // 2 + side, width - 2 * side : width - side] = np.asarray(label, np.float32) / 255
    return out


def contrast(picture: np.ndarray, factor: float) -> np.ndarray:
    """Distances from the mean grey multiplied by `factor`, clipped to [0, 1]."""
    mean = picture.mean()
    return np.clip(mean + (picture - mean) * factor, 0, 1)


# Each takes a picture (H, W) float32 in [0, 1] and gives another of the same size and range.
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "rotated by 15°": lambda x: rotate(x, 15),
    "rotated by −15°": lambda x: rotate(x, -15),
    "brightness +30 %": lambda x: np.clip(x * 1.3, 0, 1),
    "brightness −30 %": lambda x: x * 0.7,
    "contrast +30 %": lambda x: contrast(x, 1.3),
    "contrast −30 %": lambda x: contrast(x, 0.7),
    "JPEG, quality 30": lambda x: jpeg(x, 30),
    "shrunk to 112 pixels": lambda x: resize(resize(x, 112), x.shape),
    "Gaussian noise, σ = 0.05": lambda x: np.clip(x + np.random.default_rng(0).normal(0, 0.05, x.shape), 0, 1),
    "a side marker pasted in": marker,
}


@torch.inference_mode()
def accuracy_under(change: Callable, images: np.ndarray, labels: np.ndarray, segmenter: nn.Module, size: int,
                   nets: dict[str, nn.Module]) -> dict[str, np.ndarray]:  # fmt: skip
    """Which of the changed pictures each network still reads as labelled: {model: (N,) bool}.

    Args:
        change: one of `CHANGES`.
        images: (N, S, S) uint8.
        labels: (N,) class numbers.
        segmenter, size: for the masks of the changed pictures.
        nets: classifiers for S×S inputs.
    """
    right = {name: [] for name in nets}
    for i in range(0, len(images), 8):
        pictures = [np.asarray(change(image.astype(np.float32) / 255), np.float32) for image in images[i : i + 8]]
        masks = np.stack([lungs.at(pictures[0].shape) for lungs in predict_lungs(segmenter, pictures, size)])
        seen = torch.from_numpy(np.stack([segmented_lungs(p, m) for p, m in zip(pictures, masks)]))[:, None]
        mask = torch.from_numpy(masks.astype(np.float32))[:, None]
        for name, net in nets.items():
            device = next(net.parameters()).device
            predicted = net(seen.to(device), mask.to(device)).argmax(1).cpu().numpy()
            right[name].append(predicted == labels[i : i + 8])
    return {name: np.concatenate(parts) for name, parts in right.items()}
