"""ResUNet: a symmetric U-Net in which every convolutional block is residual (MANet, section 3.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, conv1x1


class ResUNet(nn.Module):
    """Lung segmenter: image (B, 1, H, W) in [0, 1] -> mask logits (B, 1, H, W).

    Args:
        width: channels of the first level; each of the four levels below doubles them.

    Height and width are free; multiples of 16 keep the levels aligned.
    `forward` is `forward_head` of `forward_features`.
    """

    def __init__(self, in_channels: int = 1, width: int = 32):
        super().__init__()
        widths = [width << level for level in range(5)]
        self.stem = _residual(in_channels, width)
        self.down = nn.ModuleList(_residual(a, b, stride=2) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(_residual(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1]))
        self.head = nn.Conv2d(width, 1, 1)
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
        """Mask logits (B, 1, H, W) of what `forward_features` returns."""
        x = levels[-1]
        for up, skip in zip(self.up, levels[-2::-1]):
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = up(torch.cat([skip, x], 1))
        return self.head(x)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))


def _residual(inputs: int, outputs: int, stride: int = 1) -> BasicBlock:
    """torchvision's basic block, its shortcut projected where the shape changes."""
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)
