"""Inception v3 without its auxiliary head (Szegedy 2016): plain, with mask attention, with CBAM.

torchvision's Inception3, subclassed, so that its state-dict keys stay valid here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import inception as torchvisions

from .attention import CBAM, AttentionMap, NoMap, conv_bn
from .classifier import Classifier

# convolutions and poolings before the first Inception module, in order
STEM = [
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1",
    "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2",
]  # fmt: skip

# the Inception modules in order, and the channels that each puts out
MODULES = {
    "Mixed_5b": 256, "Mixed_5c": 288, "Mixed_5d": 288,
    "Mixed_6a": 768, "Mixed_6b": 768, "Mixed_6c": 768, "Mixed_6d": 768, "Mixed_6e": 768,
    "Mixed_7a": 1280, "Mixed_7b": 2048, "Mixed_7c": 2048,
}  # fmt: skip


class MaskModule(nn.Module):
    """Mixin for an Inception module: one map for its concatenated output.

    The map follows `path`, the branch with the largest receptive field (of equals,
    the first). Multiplying behind the branches' ReLUs is the same as before them,
    since a map is never negative.
    """

    path: tuple[str, ...]
    ends: tuple[str, ...]  # last convolutions of all branches, in the order of the output's channels

    def forward(self, x: Tensor | None, m: AttentionMap | NoMap):
        for name in self.path:
            m = m.pool(getattr(self, name).conv)
        return None if x is None else m.attend(super().forward(x)), m


class InceptionA(MaskModule, torchvisions.InceptionA):
    """5×5 beside two 3×3, of equal reach."""

    path = ("branch5x5_2",)
    ends = ("branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool")


class InceptionB(MaskModule, torchvisions.InceptionB):
    """Reduction to half the size; its second 3×3 halves. Its last channels are its input, max-pooled."""

    path = ("branch3x3dbl_2", "branch3x3dbl_3")
    ends = ("branch3x3", "branch3x3dbl_3")


class InceptionC(MaskModule, torchvisions.InceptionC):
    """Factorised 7×7, twice in a row."""

    path = ("branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5")
    ends = ("branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool")


class InceptionD(MaskModule, torchvisions.InceptionD):
    """Reduction to half the size; the 3×3 after a factorised 7×7 halves. Its last channels are its input, pooled."""

    path = ("branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")
    ends = ("branch3x3_2", "branch7x7x3_4")


class InceptionE(MaskModule, torchvisions.InceptionE):
    """3×3, then 1×3 and 3×1 side by side, of equal reach."""

    path = ("branch3x3dbl_2", "branch3x3dbl_3a")
    ends = ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool")


class Inception(Classifier, torchvisions.Inception3):
    """Inception v3 on one-channel images of at least 75×75.

    Mask attention multiplies after the stem's BNs and on each module's output; CBAM follows each module.
    """

    def __init__(self, attention: str, num_classes: int, in_channels: int):
        modules = [torchvisions.BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE]
        torchvisions.Inception3.__init__(
            self,
            num_classes,
            aux_logits=False,
            init_weights=True,
            inception_blocks=[*modules, torchvisions.InceptionAux],
        )
        self.attention = attention
        if in_channels != 3:
            self.Conv2d_1a_3x3 = torchvisions.BasicConv2d(in_channels, 32, kernel_size=3, stride=2)
            nn.init.trunc_normal_(self.Conv2d_1a_3x3.conv.weight, std=0.1, a=-2, b=2)
        self.cbam = nn.ModuleDict()
        if attention == "cbam":
            self.cbam.update({name: CBAM(channels) for name, channels in MODULES.items()})
        # Modules put out features and map; hooks want the features.
        self.finer, self.out = nn.Identity(), nn.Identity()

    @property
    def last_block(self) -> nn.Module:
        return self.out

    def walk(self, x: Tensor | None, m: AttentionMap | NoMap):
        """Features (B, 2048, h, w) of the last module; h = 5 for 224 pixels, 14 for 512. See `Classifier.walk`."""
        for name in STEM:
            layer = getattr(self, name)
            if isinstance(layer, nn.MaxPool2d):
                x, m = None if x is None else layer(x), m.pool(layer)
            else:
                x, m = conv_bn(layer.conv, layer.bn, x, m)
                x = None if x is None else F.relu(x, inplace=True)
        for name in MODULES:
            x, m = getattr(self, name)(x, m)
            if self.cbam and x is not None:
                x = self.cbam[name](x)
            if name == "Mixed_6e" and x is not None:
                x = self.finer(x)
        return None if x is None else self.out(x), m

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(self.dropout(self.avgpool(features)).flatten(1))

    @property
    def finer_block(self) -> nn.Module:
        return self.finer

    def cbams(self) -> Iterator[tuple[CBAM, list[nn.BatchNorm2d]]]:
        for name, cbam in self.cbam.items():
            module = getattr(self, name)
            yield cbam, [getattr(module, end).bn for end in module.ends]

    @torch.no_grad()
    def start_cbam_as_identity(self) -> None:
        """See `Classifier`. What a reduction merely pools has no batch norm: the next module's kernels make up for it.

        All that reads a module's output is a convolution, or an average pooling before one, so that this is exact.
        """
        super().start_cbam_as_identity()
        for name, following in zip(self.cbam, list(self.cbam)[1:]):
            learnt = sum(getattr(getattr(self, name), end).conv.out_channels for end in getattr(self, name).ends)
            for layer in getattr(self, following).modules():
                if isinstance(layer, nn.Conv2d) and layer.in_channels == MODULES[name]:
                    layer.weight[:, learnt:].mul_(4)
