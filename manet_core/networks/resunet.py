"""ResUNet: a symmetric U-Net in which every convolutional block is residual (MANet, section 3.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, conv1x1


class ResUNet(nn.Module):
    """Lung segmenter: image (B, in_channels, H, W) float in [0, 1] -> mask logits (B, 1, H, W).

    Sets of lung masks are drawn by several conventions: some leave out the heart's shadow, some do not. A network
    trained on several sets draws one mask for each convention, so that none has to stand for the others.

    Args:
        in_channels: channels of the image; X-rays have one.
        width: channels of the first level; each of the four levels below doubles them.
        conventions: number of masks that the last layer draws. The first is what `forward` returns.

    Height and width are free; multiples of 16 keep the levels aligned.
    `forward` is `forward_head` of `forward_features`.

    Raises:
        ValueError: `conventions` is less than one.
    """

    def __init__(self, in_channels: int = 1, width: int = 32, conventions: int = 1):
        if conventions < 1:
            raise ValueError(f"A segmenter draws at least one mask, not {conventions}.")
        super().__init__()
        widths = [width << level for level in range(5)]
        self.stem = _residual(in_channels, width)
        self.down = nn.ModuleList(_residual(a, b, stride=2) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(_residual(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1]))
        self.head = nn.Conv2d(width, conventions, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """Features of the five levels, (B, width · 2**i, H / 2**i, W / 2**i), the deepest last."""
        levels = [self.stem(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        return levels

    def forward_head(self, levels: list[Tensor]) -> Tensor:
        """Mask logits (B, 1, H, W), by the first convention, of what `forward_features` returns."""
        return self._masks(levels)[:, :1]

    def forward(self, image: Tensor, every_convention: bool = False) -> Tensor:
        """Mask logits (B, 1, H, W), by the first convention; or (B, conventions, H, W), one channel each."""
        masks = self._masks(self.forward_features(image))
        return masks if every_convention else masks[:, :1]

    def _masks(self, levels: list[Tensor]) -> Tensor:
        x = levels[-1]
        for up, skip in zip(self.up, levels[-2::-1]):
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = up(torch.cat([skip, x], 1))
        return self.head(x)


def _residual(inputs: int, outputs: int, stride: int = 1) -> BasicBlock:
    """torchvision's basic block, its shortcut projected where the shape changes."""
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)
