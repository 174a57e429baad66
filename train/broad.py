"""The "broad" augmentation: a batch at a time, on the device that trains.

No X-ray shall tell its hospital by its resolution, tone, grain, framing,
compression, markers or by whose annotators its mask follows. So all of these are drawn
anew for every picture of a batch, in plain tensor operations: a GPU draws
thousands a second, and no loader has to keep up with it.
"""

import math
import os

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from manet_core.preprocess import unit_range


def broad(
    images: Tensor, masks: Tensor, boxes: Tensor, size: int, generator: torch.Generator, other_masks: bool = True
) -> tuple[Tensor, Tensor]:
    """Another look at each X-ray.

    Args:
        images: (B, 1, W, W) float in [0, 1].
        masks: (B, C, W, W) float, 0 or 1; all channels move together.
        boxes: (B, 4) float, (top, left, bottom, right) of what to show, as shares of the side (`lung_box`).
        size: side of what is returned.
        generator: on the same device; decides every draw.
        other_masks: whether the rim of the masks is moved, as another annotator might have drawn it.

    Returns:
        (B, 1, size, size) float in [0, 1] and masks (B, C, size, size) float, 0 or 1.
    """
    draw = _Draw(len(images), images.device, generator)
    grid = F.affine_grid(_placement(draw, boxes), (len(images), 1, size, size), align_corners=False)
    image = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    mask = F.grid_sample(masks, grid, mode="bilinear", align_corners=False)
    if other_masks:
        mask = _other_rim(draw, mask)
    image = _erased(draw, image)
    image = _other_tone(draw, image)
    image = _other_resolution(draw, image)
    image = _noisy(draw, image)
    image = _compressed(draw, image.clamp(0, 1))
    return image, (mask > 0.5).float()


class Draws:
    """The generator of a training's draws: its own for each epoch and each of several processes."""

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.process, self.epoch = seed, int(os.environ.get("RANK", 0)), -1
        self.generator = torch.Generator(device)

    def of(self, epoch: int) -> torch.Generator:
        """The generator; as an epoch begins, in a state that depends on nothing that was drawn before."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.generator.manual_seed(self.seed * 100_003 + epoch + self.process * 7_919_000_003)
        return self.generator


class _Draw:
    """Uniform numbers, one a picture, shaped (B, 1, 1, 1)."""

    def __init__(self, batch: int, device: torch.device, generator: torch.Generator):
        self.batch, self.device, self.generator = batch, device, generator

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(self.batch, 1, 1, 1, device=self.device, generator=self.generator)

    def often(self, p: float) -> Tensor:
        """1 with probability p, else 0."""
        return (self() < p).float()

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=self.device, generator=self.generator)


def _placement(draw: _Draw, boxes: Tensor) -> Tensor:
    """Affine matrices (B, 2, 3): the box, shifted ±8 %, scaled 0.8 to 1.25, stretched ±15 %, turned ±15°."""
    top, left, bottom, right = (side[:, None, None, None] for side in boxes.unbind(1))
    often = draw.often(0.9)
    zoom = torch.exp(often * draw(math.log(0.8), math.log(1.25)))
    stretch = torch.exp(often * draw(-0.15, 0.15))
    angle = often * draw(-15, 15) * (math.pi / 180)
    half_x, half_y = (right - left) * zoom * stretch, (bottom - top) * zoom / stretch
    x = right + left - 1 + (right - left) * often * draw(-0.16, 0.16)
    y = bottom + top - 1 + (bottom - top) * often * draw(-0.16, 0.16)
    cos, sin = angle.cos(), angle.sin()
    rows = [half_x * cos, -half_y * sin, x, half_x * sin, half_y * cos, y]
    return torch.cat(rows, 1).view(-1, 2, 3)


def _other_rim(draw: _Draw, mask: Tensor) -> Tensor:
    """Masks with a rim of up to 3 % of the side more or less, half of them as they are."""
    radius = max(1, round(0.03 * mask.shape[-1]))
    choice = draw().flatten()
    for step, r in enumerate((radius, max(1, radius // 2))):
        for low, sign in ((0.125 * step, 1), (0.25 + 0.125 * step, -1)):  # more of it, less of it
            here = ((choice >= low) & (choice < low + 0.125)).nonzero()[:, 0]
            mask = mask.index_copy(0, here, sign * _highest(sign * mask[here], r))
    return mask


def _highest(x: Tensor, r: int) -> Tensor:
    """The highest value of every square of side 2r + 1: rows first, then columns, as a square is both."""
    return F.max_pool2d(F.max_pool2d(x, (2 * r + 1, 1), 1, (r, 0)), (1, 2 * r + 1), 1, (0, r))


def _erased(draw: _Draw, image: Tensor) -> Tensor:
    """A box of one shade, as labels and markers are, over three pictures of ten."""
    side = image.shape[-1]
    place = torch.arange(side, device=image.device) / side
    x, y, w, h = draw(), draw(), draw(0.03, 0.25), draw(0.03, 0.15)
    across = ((place.view(1, 1, 1, -1) - x).abs() < w / 2) & ((place.view(1, 1, -1, 1) - y).abs() < h / 2)
    return torch.where(across & (draw() < 0.3), draw(), image)


def _other_tone(draw: _Draw, image: Tensor) -> Tensor:
    """Gamma 0.5 to 2, contrast and brightness ±30 %, a slope of light across the film, each often."""
    image = image.clamp(1e-4, 1) ** torch.exp(draw.often(0.6) * draw(-0.7, 0.7))
    mean = image.mean((1, 2, 3), keepdim=True)
    image = mean + (image - mean) * (1 + draw.often(0.6) * draw(-0.3, 0.3)) + draw.often(0.6) * draw(-0.2, 0.2)
    ramp = torch.linspace(-1, 1, image.shape[-1], device=image.device)
    often = draw.often(0.3)
    slope = often * draw(-0.15, 0.15) * ramp.view(1, 1, 1, -1) + often * draw(-0.15, 0.15) * ramp.view(1, 1, -1, 1)
    return image + slope


def _other_resolution(draw: _Draw, image: Tensor) -> Tensor:
    """A fifth of the pictures each through 64, 96 and 144 pixels and back."""
    size = image.shape[-1]
    choice = draw().flatten()
    for step, low in enumerate((64, 96, 144)):
        here = ((choice >= 0.2 * step) & (choice < 0.2 * (step + 1))).nonzero()[:, 0]
        coarse = F.interpolate(image[here], (low, low), mode="bilinear", antialias=True)
        image = image.index_copy(0, here, F.interpolate(coarse, (size, size), mode="bilinear"))
    return image


def _noisy(draw: _Draw, image: Tensor) -> Tensor:
    """Noise of σ up to 0.1, in half of the pictures; in some of these in grains of two pixels."""
    noise = draw.normal(image)
    coarse = F.interpolate(noise[..., ::2, ::2], image.shape[-2:], mode="bilinear")
    noise = torch.where(draw() < 0.3, coarse, noise)
    return image + draw.often(0.5) * draw(0, 0.1) * noise


def _compressed(draw: _Draw, image: Tensor) -> Tensor:
    """Half of the pictures as JPEG of quality 20 to 95 leaves them."""
    here, quality = draw.often(0.5).flatten().nonzero()[:, 0], draw(20, 95).flatten()
    return image.index_copy(0, here, jpeg(image[here], quality[here]))


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Grey pictures as they come out of a JPEG file; libjpeg writes and reads it on the CPU, 0.5 ms a picture.

    Args:
        image: (B, 1, H, W) float in [0, 1].
        quality: (B,) float, 1 to 100, as libjpeg counts it.

    Returns:
        (B, 1, H, W) float in [0, 1].
    """
    pixels = (image * 255).round().to(torch.uint8).cpu()
    files = [encode_jpeg(one, round(q)) for one, q in zip(pixels, quality.tolist())]
    read = [decode_jpeg(file, ImageReadMode.GRAY) for file in files]
    return torch.stack(read).to(image) / 255 if read else image


def shown(images: Tensor, masks: Tensor, sees: str) -> Tensor:
    """What the classifiers are shown, a batch at a time: as `manet_core.preprocess.network_input`.

    Args:
        images, masks: (B, 1, S, S) float in [0, 1]; masks 0 or 1.
        sees: "lungs", or one of the controls "whole", "outside", "shape".

    Returns:
        (B, 1, S, S) float in [−1, 1].

    Raises:
        ValueError: a control that is not made on the device.
    """
    if sees == "shape":
        return 2 * masks - 1
    views = {"lungs": lambda: images * masks, "whole": lambda: images, "outside": lambda: images * (1 - masks)}
    if sees not in views:
        raise ValueError(f"The broad augmentation cannot show {sees!r}; choose one of: {', '.join(views)}, shape.")
    return 2 * unit_range(views[sees]()) - 1
