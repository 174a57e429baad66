"""VGG-16 with batch norm (Simonyan & Zisserman 2015): plain, with mask attention, with CBAM.

torchvision's VGG, subclassed, so that its state-dict keys stay valid here.
"""

from collections.abc import Iterator

import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from .attention import CBAM, AttentionMap, NoMap
from .classifier import Classifier


class VGG(Classifier, torchvision.models.VGG):
    """VGG-16 on one-channel images; mask attention multiplies after every BN, CBAM once a block, after its last BN."""

    def __init__(self, attention: str, num_classes: int, in_channels: int):
        torchvision.models.VGG.__init__(self, make_layers(cfgs["D"], batch_norm=True), num_classes=num_classes)
        self.attention = attention
        if in_channels != 3:
            self.features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
            nn.init.kaiming_normal_(self.features[0].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(self.features[0].bias)
        self.cbam = nn.ModuleDict()  # by the position of the batch norm before it
        if attention == "cbam":
            ends = [i - 2 for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
            self.cbam.update({str(i): CBAM(self.features[i].num_features) for i in ends})

    @property
    def last_block(self) -> nn.Module:
        return self.features[-2]

    def walk(self, x: Tensor | None, m: AttentionMap | NoMap):
        """Features (B, 512, H/16, W/16) after the last ReLU, before the last pooling; see `Classifier.walk`."""
        for i, layer in enumerate(self.features[:-1]):
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
                m = m.pool(layer)
            if x is not None:
                x = layer(x)
                if isinstance(layer, nn.BatchNorm2d):
                    x = m.attend(x)
                if str(i) in self.cbam:
                    x = self.cbam[str(i)](x)
        return x, m

    def forward_head(self, features: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features[-1](features)).flatten(1))

    @property
    def finer_block(self) -> nn.Module:
        poolings = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        return self.features[poolings[-2] - 1]

    def cbams(self) -> Iterator[tuple[CBAM, list[nn.BatchNorm2d]]]:
        for i, cbam in self.cbam.items():
            yield cbam, [self.features[int(i)]]
