"""EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation): plain, with mask attention, with CBAM.

A backbone for laptops, 0.4 GFLOP and 4.7 M parameters, beyond the paper. The
state-dict keys are timm's `efficientnet_lite0`, and the same weights give the
same logits in both.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CBAM, AttentionMap, NoMap, conv_bn
from .classifier import Classifier

# (kernel, stride, expansion, channels, repeats) of the seven stages
STAGES = [
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]


def depthwise(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    """A convolution with one kernel a channel."""
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)


class DepthwiseSeparable(nn.Module):
    """Depthwise, then pointwise convolution: the block of the first stage."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, attention: str):
        super().__init__()
        self.conv_dw = depthwise(inputs, kernel, stride)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.cbam = CBAM(outputs) if attention == "cbam" else nn.Identity()
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor | None, m: AttentionMap | NoMap):
        out, m = conv_bn(self.conv_dw, self.bn1, x, m)
        if x is None:
            return None, m
        out = self.cbam(self.bn2(self.conv_pw(F.relu6(out, inplace=True))))
        return out + x if self.residual else out, m


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (MobileNetV2): the block of all other stages."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, attention: str):
        super().__init__()
        hidden = inputs * expansion
        self.conv_pw = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv_dw = depthwise(hidden, kernel, stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv_pwl = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.cbam = CBAM(outputs) if attention == "cbam" else nn.Identity()
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor | None, m: AttentionMap | NoMap):
        out = None if x is None else F.relu6(self.bn1(self.conv_pw(x)), inplace=True)
        out, m = conv_bn(self.conv_dw, self.bn2, out, m)
        if x is None:
            return None, m
        out = self.cbam(self.bn3(self.conv_pwl(F.relu6(out, inplace=True))))
        return out + x if self.residual else out, m


class EfficientNetLite(Classifier):
    """EfficientNet-Lite0.

    Mask attention multiplies after the BN of the stem and of every depthwise convolution; CBAM sits on each block's
    residual branch, after its last BN.
    """

    def __init__(self, attention: str, num_classes: int, in_channels: int):
        super().__init__()
        self.attention = attention
        self.conv_stem = nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        stages, inputs = [], 32
        for kernel, stride, expansion, outputs, repeats in STAGES:
            block = DepthwiseSeparable if expansion == 1 else InvertedResidual
            blocks = [block(inputs, outputs, kernel, stride, expansion, attention)]
            blocks += [block(outputs, outputs, kernel, 1, expansion, attention) for _ in range(repeats - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.finer = nn.Identity()  # blocks put out features and map; hooks want the features
        self.conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.act = nn.ReLU6()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels // module.groups * module.kernel_size[0] ** 2
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    @property
    def last_block(self) -> nn.Module:
        return self.act

    def walk(self, x: Tensor | None, m: AttentionMap | NoMap):
        """Features (B, 1280, H/32, W/32) of the last convolution, after its BN and ReLU6; see `Classifier.walk`."""
        x, m = conv_bn(self.conv_stem, self.bn1, x, m)
        x = None if x is None else F.relu6(x, inplace=True)
        for i, stage in enumerate(self.blocks):
            for block in stage:
                x, m = block(x, m)
            if i == 4 and x is not None:  # the next stage is the last that halves
                x = self.finer(x)
        return None if x is None else self.act(self.bn2(self.conv_head(x))), m

    def forward_head(self, features: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.avgpool(features).flatten(1)))

    @property
    def finer_block(self) -> nn.Module:
        return self.finer
