"""Mask attention (MA), plain and normalised, and CBAM: the attentions that are compared.

Mask attention has no parameters: the lung mask is average-pooled alongside the
features, with the kernel, stride and padding of every layer that the features
pass, and multiplies them (MANet, eq. 3 and 4). With image I[0] and mask M[0]:

    I[i+1] = A(BN(conv(I[i]; k, s, p)) ⊗ P(M[i]; k, s, p)),   M[i+1] = P(M[i]; k, s, p)

A map element is thus the share of lung pixels in the receptive field of the
feature beside it. Padding counts as no lung, so the maps fade from the rim
inwards even where all is lung. Normalised mask attention multiplies by
P(M[i]) / P(O[i]) instead, where O[0] is a mask of the same size that is all
lung: the share of lung among those pixels of the receptive field that lie in
the picture. An all-lung mask then changes nothing.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AttentionMap:
    """The lung mask on its way through a network: the map that belongs to the features beside it.

    Args:
        mask: (B, 1, H, W) float in [0, 1], of the image's height and width.
        normalised: divide each map by that of an all-lung mask.
    """

    def __init__(self, mask: Tensor, normalised: bool = False):
        if normalised:
            mask = torch.cat([mask, mask.new_ones(1, *mask.shape[1:])])  # the last row is the all-lung mask
        self._pooled, self._normalised, self._before = mask, normalised, None

    @property
    def values(self) -> Tensor:
        """What multiplies the features: (B, 1, h, w) in [0, 1], of the mask's dtype.

        Normalised: 0 where the map of an all-lung mask is 0.
        """
        if not self._normalised:
            return self._pooled
        own, whole = self._pooled[:-1], self._pooled[-1:]
        return own / whole.clamp(min=torch.finfo(whole.dtype).tiny)  # at most 1: rounding keeps own ≤ whole

    def pool(self, layer: nn.Module) -> Self:
        """The map behind `layer`: average-pooled with its kernel, stride and padding, which counts as no lung.

        Args:
            layer: a convolution or pooling layer (anything with `kernel_size`, `stride` and `padding`), undilated.

        Returns:
            The map of the spatial size of the layer's output; this very one where the kernel is 1×1 with stride 1.
        """
        kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
        if kernel == (1, 1) and stride == (1, 1):
            return self
        behind = object.__new__(type(self))
        behind._pooled = F.avg_pool2d(self._pooled, kernel, stride, _pair(layer.padding))
        behind._normalised, behind._before = self._normalised, self
        return behind

    def attend(self, features: Tensor) -> Tensor:
        """Multiply `features` (B, C, h, w) by this map, in place, in the features' dtype.

        The features must be the fresh output of a batch norm or a sum, which no gradient needs again. Where the map
        has a gradient itself, as that of a predicted mask, a copy of them is kept for it.

        Raises:
            ValueError: the mask had another height or width than the image.
        """
        if self._pooled.shape[-2:] != features.shape[-2:]:
            raise ValueError(
                f"The mask's map is {tuple(self._pooled.shape[-2:])} where the features are "
                f"{tuple(features.shape[-2:])}: give an image and a mask of the same height and width."
            )
        return features.mul_(self.values.to(features.dtype))

    def pyramid(self) -> list[Tensor]:
        """The maps on the way to here, in order of depth, this one last and the mask left out: (B, 1, h, w) each."""
        maps, at = [], self
        while at._before is not None:
            maps.append(at.values)
            at = at._before
        return maps[::-1]


class NoMap:
    """Takes the place of `AttentionMap` in networks without mask attention, and changes nothing."""

    def pool(self, layer: nn.Module) -> Self:
        return self

    def attend(self, features: Tensor) -> Tensor:
        return features

    def pyramid(self) -> list[Tensor]:
        return []


def conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor | None, m: AttentionMap | NoMap):
    """One step of the equation, short of its non-linearity.

    Args:
        x: features (B, C, h, w); None to follow the map alone.
        m: the map beside them.

    Returns:
        BN(conv(x)) ⊗ P(m), or None without features; and P(m). A 1×1 convolution leaves the map as it is and
        multiplies nothing.
    """
    behind = m.pool(conv)
    if x is not None:
        x = bn(conv(x))
        x = x if behind is m else behind.attend(x)
    return x, behind


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
