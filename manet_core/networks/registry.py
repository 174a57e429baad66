"""Names to networks: one row a backbone family, three attentions each."""

from importlib import import_module

from torch import nn

from ..tasks import CLASSES

_BACKBONES = {  # name: (module and function in it that build it, how people write it)
    "efficientnet_lite0": ("efficientnet_lite", "EfficientNet-Lite0"),
    "resnet34": ("resnet", "ResNet-34"),
    "resnet50": ("resnet", "ResNet-50"),
    "vgg16": ("vgg", "VGG-16"),
    "inception_v3": ("inception", "Inception v3"),
}
ATTENTIONS = {"": "plain", "ma": "mask attention (MA)", "nma": "normalised mask attention", "cbam": "CBAM"}


def list_models() -> list[str]:
    """Every classifier's name, plain, `_ma` and `_cbam` of a backbone next to each other."""
    return [f"{backbone}_{attention}".rstrip("_") for backbone in _BACKBONES for attention in ATTENTIONS]


def split_name(name: str) -> tuple[str, str]:
    """("resnet50", "ma") of "resnet50_ma"; the attention is "" for a plain network.

    Raises:
        ValueError: no such model.
    """
    for backbone in _BACKBONES:
        attention = name.removeprefix(backbone).removeprefix("_")
        if name == f"{backbone}_{attention}".rstrip("_") and attention in ATTENTIONS:
            return backbone, attention
    raise ValueError(f"There is no model {name!r}; choose one of: {', '.join(list_models())}.")


def human_name(name: str) -> tuple[str, str]:
    """("ResNet-34", "mask attention (MA)") of "resnet34_ma".

    Raises:
        ValueError: no such model.
    """
    backbone, attention = split_name(name)
    return _BACKBONES[backbone][1], ATTENTIONS[attention]


def create_classifier(name: str, num_classes: int = len(CLASSES), in_channels: int = 1) -> nn.Module:
    """A classifier with random weights: net(image, mask) -> logits.

    Args:
        name: one of `list_models()`.
        num_classes: width of the logits.
        in_channels: channels of the image; X-rays have one.

    Raises:
        ValueError: no such model.

    Example:
        >>> import torch
        >>> net = create_classifier("resnet34_ma").eval()
        >>> net(torch.zeros(2, 1, 224, 224), torch.ones(2, 1, 224, 224)).shape
        torch.Size([2, 5])
    """
    backbone, attention = split_name(name)
    family, _ = _BACKBONES[backbone]
    build = getattr(import_module(f".{family}", __package__), family)  # not before: torchvision takes seconds
    return build(backbone, attention, num_classes, in_channels)


def create_segmenter(name: str = "resunet", in_channels: int = 1, width: int = 32, conventions: int = 1) -> nn.Module:
    """A lung segmenter with random weights: net(image) -> mask logits.

    Args:
        name: "resunet", the only one.
        in_channels: channels of the image (B, in_channels, H, W) in [0, 1]; X-rays have one.
        width: channels of the first level.
        conventions: number of ways to draw a lung that are told apart. net(image) is (B, 1, H, W) whatever it is;
            `net(image, every_convention=True)` is (B, conventions, H, W).

    Raises:
        ValueError: `name` is not "resunet", or `conventions` is less than one.
    """
    if name != "resunet":
        raise ValueError(f"There is no segmenter {name!r}; the only one is 'resunet'.")
    from .resunet import ResUNet

    return ResUNet(in_channels, width, conventions)
