"""Mask attention (MA) and CBAM, the two attentions that MANet compares.

Mask attention has no parameters: the lung mask is average-pooled alongside the
features, with the kernel, stride and padding of every layer that the features
pass, and multiplies them. A map element is thus the share of lung pixels in the
receptive field of the feature beside it (MANet, eq. 3 and 4).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pool_like(layer: nn.Module, mask: Tensor) -> Tensor:
    """Average-pool `mask` with the kernel, stride and padding of `layer`.

    Args:
        layer: a convolution or pooling layer (anything with `kernel_size`,
            `stride` and `padding`), undilated.
        mask: (B, 1, H, W) float, in [0, 1].

    Returns:
        (B, 1, H', W') in [0, 1], of the spatial size of `layer`'s output; `mask`
        itself where the kernel is 1×1 with stride 1. Padding counts as "no lung".
    """
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    if kernel == (1, 1) and stride == (1, 1):
        return mask
    return F.avg_pool2d(mask, kernel, stride, _pair(layer.padding))


def attend(features: Tensor, maps: Iterator[Tensor] | None) -> Tensor:
    """Multiply `features` (B, C, h, w) by the pyramid's next map; unchanged where `maps` is None.

    In place: the input is always the fresh output of a batch norm or a sum,
    which no gradient needs again, and the map itself has no gradient.

    Raises:
        ValueError: the mask had another height or width than the image.
    """
    if maps is None:
        return features
    attention_map = next(maps)
    if attention_map.shape[-2:] != features.shape[-2:]:
        raise ValueError(
            f"The mask's map is {tuple(attention_map.shape[-2:])} where the features are "
            f"{tuple(features.shape[-2:])}: give an image and a mask of the same height and width."
        )
    return features.mul_(attention_map.to(features.dtype))


class ChannelAttention(nn.Module):
    """CBAM's channel gate: one bias-free MLP on average- and max-pooled features (Woo 2018, 3.1)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.average, self.maximum = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp(self.average(x)) + self.mlp(self.maximum(x))  # (B, C, 1, 1)
        return x * torch.sigmoid(gate)


class SpatialAttention(nn.Module):
    """CBAM's spatial gate: 7×7 bias-free convolution of channel mean and maximum (Woo 2018, 3.2)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (B, 2, h, w)
        return x * torch.sigmoid(self.conv(pooled))


class CBAM(nn.Sequential):
    """Channel, then spatial attention, shape-preserving on (B, C, h, w) (Woo, Park, Lee, Kweon; ECCV 2018)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__(ChannelAttention(channels, reduction), SpatialAttention())


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
