"""ResNet-34 and ResNet-50 (He 2016): plain, with mask attention, with CBAM.

torchvision's ResNet, subclassed, so that its state-dict keys stay valid here.
"""

from collections.abc import Iterator

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .attention import CBAM, attend, pool_like
from .classifier import Classifier, MaskAttentionClassifier


class ResNet(Classifier, torchvision.models.ResNet):
    """ResNet on one-channel images; CBAM, where asked for, sits in its blocks."""

    def __init__(self, block: type[nn.Module], layers: list[int], num_classes: int, in_channels: int):
        torchvision.models.ResNet.__init__(self, block, layers, num_classes=num_classes)
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> Iterator[nn.Module]:
        """All residual blocks in order of depth."""
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            yield from layer

    @property
    def last_block(self) -> nn.Module:
        return self.layer4[-1]

    def forward_features(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for block in self.blocks():
            x = block(x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(self.avgpool(features).flatten(1))

    forward = Classifier.forward


class MaskResNet(MaskAttentionClassifier, ResNet):
    """ResNet whose stem and blocks are weighted by the mask pyramid (MANet, Fig. 4)."""

    def attention_maps(self, mask: Tensor) -> list[Tensor]:
        stem = pool_like(self.conv1, mask)
        maps = [stem, pool_like(self.maxpool, stem)]
        for block in self.blocks():
            maps += block.attention_maps(maps[-1])
        return maps

    def forward_features(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = self.pyramid(mask)
        x = self.maxpool(self.relu(attend(self.bn1(self.conv1(image)), maps)))
        next(maps)  # the pooling layer pools the map; there is nothing to multiply
        for block in self.blocks():
            x = block(x, maps)
        return x


class MaskBasicBlock(BasicBlock):
    """Basic block; the map multiplies after the first BN and on the sum before the last ReLU."""

    def attention_maps(self, mask: Tensor) -> list[Tensor]:
        """The block's two maps (B, 1, h, w), from the map of its input."""
        first = pool_like(self.conv1, mask)
        return [first, pool_like(self.conv2, first)]

    def forward(self, x: Tensor, maps: Iterator[Tensor]) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(attend(self.bn1(self.conv1(x)), maps))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(attend(out, maps))


class MaskBottleneck(Bottleneck):
    """Bottleneck; the map multiplies once, at the 3×3 convolution."""

    def attention_maps(self, mask: Tensor) -> list[Tensor]:
        """The block's one map (B, 1, h, w), from the map of its input."""
        return [pool_like(self.conv2, mask)]

    def forward(self, x: Tensor, maps: Iterator[Tensor]) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(attend(self.bn2(self.conv2(out)), maps))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class CBAMBasicBlock(BasicBlock):
    """Basic block with CBAM on the residual branch, after its last BN."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.cbam = CBAM(planes * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.cbam(self.bn2(self.conv2(out)))
        out += identity
        return self.relu(out)


class CBAMBottleneck(Bottleneck):
    """Bottleneck with CBAM on the residual branch, after its last BN."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.cbam = CBAM(planes * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.cbam(self.bn3(self.conv3(out)))
        out += identity
        return self.relu(out)


_LAYERS = {"resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}
_BLOCKS = {
    "resnet34": {"": BasicBlock, "ma": MaskBasicBlock, "cbam": CBAMBasicBlock},
    "resnet50": {"": Bottleneck, "ma": MaskBottleneck, "cbam": CBAMBottleneck},
}


def resnet(backbone: str, attention: str, num_classes: int, in_channels: int) -> ResNet:
    """Build `backbone` ("resnet34" or "resnet50") with `attention` "", "ma" or "cbam"."""
    network = MaskResNet if attention == "ma" else ResNet
    return network(_BLOCKS[backbone][attention], _LAYERS[backbone], num_classes, in_channels)
