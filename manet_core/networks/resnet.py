"""ResNet-34 and ResNet-50 (He 2016): plain, with mask attention, with CBAM.

torchvision's ResNet, subclassed, so that its state-dict keys stay valid here.
"""

from torch import Tensor, nn
from torchvision.models import resnet as torchvisions

from .attention import CBAM, AttentionMap, NoMap, conv_bn
from .classifier import Classifier


class BasicBlock(torchvisions.BasicBlock):
    """Basic block; the map multiplies after the first BN and on the sum before the last ReLU."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.cbam = nn.Identity()

    def forward(self, x: Tensor | None, m: AttentionMap | NoMap):
        out, m = conv_bn(self.conv1, self.bn1, x, m)
        m = m.pool(self.conv2)
        if x is None:
            return None, m
        out = self.cbam(self.bn2(self.conv2(self.relu(out))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(m.attend(out)), m


class Bottleneck(torchvisions.Bottleneck):
    """Bottleneck; the map multiplies once, at the 3×3 convolution."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.cbam = nn.Identity()

    def forward(self, x: Tensor | None, m: AttentionMap | NoMap):
        out = None if x is None else self.relu(self.bn1(self.conv1(x)))
        out, m = conv_bn(self.conv2, self.bn2, out, m)
        if x is None:
            return None, m
        out = self.cbam(self.bn3(self.conv3(self.relu(out))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out), m


class CBAMBasicBlock(BasicBlock):
    """Basic block with CBAM on the residual branch, after its last BN."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.cbam = CBAM(planes * self.expansion)


class CBAMBottleneck(Bottleneck):
    """Bottleneck with CBAM on the residual branch, after its last BN."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.cbam = CBAM(planes * self.expansion)


_BLOCKS = {"resnet34": (BasicBlock, CBAMBasicBlock), "resnet50": (Bottleneck, CBAMBottleneck)}


class ResNet(Classifier, torchvisions.ResNet):
    """ResNet on one-channel images; mask attention multiplies at the stem and in the blocks (MANet, Fig. 4)."""

    def __init__(self, backbone: str, attention: str, num_classes: int, in_channels: int):
        block = _BLOCKS[backbone][attention == "cbam"]
        torchvisions.ResNet.__init__(self, block, [3, 4, 6, 3], num_classes=num_classes)
        self.attention = attention
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        # Blocks put out features and map; hooks want the features.
        self.finer, self.out = nn.Identity(), nn.Identity()

    @property
    def last_block(self) -> nn.Module:
        return self.out

    def walk(self, x: Tensor | None, m: AttentionMap | NoMap):
        """Features (B, 512 or 2048, H/32, W/32) of the last block; see `Classifier.walk`."""
        x, m = conv_bn(self.conv1, self.bn1, x, m)
        x = None if x is None else self.maxpool(self.relu(x))
        m = m.pool(self.maxpool)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x, m = block(x, m)
            if layer is self.layer3 and x is not None:
                x = self.finer(x)
        return None if x is None else self.out(x), m

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(self.avgpool(features).flatten(1))

    @property
    def finer_block(self) -> nn.Module:
        return self.finer
