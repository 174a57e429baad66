"""Inception v3 without its auxiliary head (Szegedy 2016): plain, with mask attention, with CBAM.

torchvision's Inception3, subclassed, so that its state-dict keys stay valid here.
"""

from collections.abc import Iterator

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import (
    BasicConv2d,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from .attention import CBAM, attend, pool_like
from .classifier import Classifier, MaskAttentionClassifier

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


class Inception(Classifier, torchvision.models.Inception3):
    """Inception v3 on one-channel images of at least 75×75; `attention` is "" or "cbam" (after each module)."""

    def __init__(
        self, attention: str, num_classes: int, in_channels: int, modules: list[type[nn.Module]] | None = None
    ):
        torchvision.models.Inception3.__init__(
            self, num_classes, aux_logits=False, init_weights=True, inception_blocks=modules
        )
        if in_channels != 3:
            self.Conv2d_1a_3x3 = BasicConv2d(in_channels, 32, kernel_size=3, stride=2)
            nn.init.trunc_normal_(self.Conv2d_1a_3x3.conv.weight, std=0.1, a=-2, b=2)
        self.cbam = nn.ModuleDict()
        if attention == "cbam":
            self.cbam.update({name: CBAM(channels) for name, channels in MODULES.items()})

    @property
    def last_block(self) -> nn.Module:
        return self.cbam["Mixed_7c"] if self.cbam else self.Mixed_7c

    def forward_features(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features (B, 2048, h, w) of the last Inception module; h = 5 for 224 pixels, 14 for 512."""
        x = image
        for name in STEM:
            x = getattr(self, name)(x)
        for name in MODULES:
            x = getattr(self, name)(x)
            if self.cbam:
                x = self.cbam[name](x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(self.dropout(self.avgpool(features)).flatten(1))

    forward = Classifier.forward


class MaskInception(MaskAttentionClassifier, Inception):
    """Inception v3 whose stem convolutions and modules are weighted by the mask pyramid."""

    def __init__(self, num_classes: int, in_channels: int):
        modules = [MaskInceptionA, MaskInceptionB, MaskInceptionC, MaskInceptionD, MaskInceptionE]
        Inception.__init__(self, "", num_classes, in_channels, [BasicConv2d, *modules, InceptionAux])

    def attention_maps(self, mask: Tensor) -> list[Tensor]:
        maps = [mask]
        for name in STEM:
            if name != "Conv2d_3b_1x1":  # leaves the map as it is
                layer = getattr(self, name)
                maps.append(pool_like(getattr(layer, "conv", layer), maps[-1]))
        for name in MODULES:
            maps += getattr(self, name).attention_maps(maps[-1])
        return maps[1:]

    def forward_features(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        maps, x = self.pyramid(mask), image
        for name in STEM:
            layer = getattr(self, name)
            if isinstance(layer, nn.MaxPool2d):
                x = layer(x)
                next(maps)  # the pooling layer pools the map; there is nothing to multiply
            else:
                x = layer.bn(layer.conv(x))
                x = F.relu(x if name == "Conv2d_3b_1x1" else attend(x, maps), inplace=True)
        for name in MODULES:
            x = getattr(self, name)(x, maps)
        return x


class MaskModule(nn.Module):
    """Mixin for an Inception module: one map for its concatenated output.

    The map follows `path`, the branch with the largest receptive field (of equals,
    the first). Multiplying behind the branches' ReLUs is the same as before them,
    since a map is never negative.
    """

    path: tuple[str, ...]

    def attention_maps(self, mask: Tensor) -> list[Tensor]:
        """The maps (B, 1, h, w) along `path`, from the map of the module's input; the last one multiplies."""
        maps = [mask]
        for name in self.path:
            maps.append(pool_like(getattr(self, name).conv, maps[-1]))
        return maps[1:]

    def forward(self, x: Tensor, maps: Iterator[Tensor]) -> Tensor:
        out = super().forward(x)
        for _ in self.path[1:]:
            next(maps)
        return attend(out, maps)


class MaskInceptionA(MaskModule, InceptionA):
    """5×5 beside two 3×3, of equal reach."""

    path = ("branch5x5_2",)


class MaskInceptionB(MaskModule, InceptionB):
    """Reduction to half the size; its second 3×3 halves."""

    path = ("branch3x3dbl_2", "branch3x3dbl_3")


class MaskInceptionC(MaskModule, InceptionC):
    """Factorised 7×7, twice in a row."""

    path = ("branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5")


class MaskInceptionD(MaskModule, InceptionD):
    """Reduction to half the size; the 3×3 after a factorised 7×7 halves."""

    path = ("branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")


class MaskInceptionE(MaskModule, InceptionE):
    """3×3, then 1×3 and 3×1 side by side, of equal reach."""

    path = ("branch3x3dbl_2", "branch3x3dbl_3a")


def inception(backbone: str, attention: str, num_classes: int, in_channels: int) -> Inception:
    """Build "inception_v3" with `attention` "", "ma" or "cbam"."""
    if attention == "ma":
        return MaskInception(num_classes, in_channels)
    return Inception(attention, num_classes, in_channels)
