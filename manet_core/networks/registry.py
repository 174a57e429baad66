"""Names to networks: one row a backbone, and the attentions that each can have."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from torch import nn

from ..tasks import CLASSES

ATTENTIONS = {"": "plain", "ma": "mask attention (MA)", "nma": "normalised mask attention", "cbam": "CBAM"}


class _Backbone(NamedTuple):
    title: str
    build: Callable[[str, int, int], nn.Module]
    attentions: tuple[str, ...]


_BACKBONES: dict[str, _Backbone] = {}


def register_backbone(
    name: str,
    title: str,
    build: Callable[[str, int, int], nn.Module],
    attentions: Sequence[str] = tuple(ATTENTIONS),
) -> None:
    """Add a backbone: `name`, `name_ma`, `name_nma` and `name_cbam` are networks from then on.

    Args:
        name: new, and no name of a network that there is.
        title: how people write it, "ResNet-34".
        build: (attention, num_classes, in_channels) -> `networks.classifier.Classifier` with random weights. Called
            when a network is made, so that it can leave slow imports until then.
        attentions: those of `ATTENTIONS` that it can have, "" for the plain network.

    Raises:
        ValueError: a name that is taken, or an attention that there is not.
    """
    if unknown := [attention for attention in attentions if attention not in ATTENTIONS]:
        raise ValueError(f"There is no attention {unknown[0]!r}; choose from: {', '.join(map(repr, ATTENTIONS))}.")
    backbone = _Backbone(title, build, tuple(attention for attention in ATTENTIONS if attention in attentions))
    taken = _names(_BACKBONES)
    if clash := [new for new in _names({name: backbone}) if new in taken]:
        raise ValueError(f"There is a model {clash[0]!r} already.")
    _BACKBONES[name] = backbone


def _names(backbones: dict[str, _Backbone]) -> dict[str, tuple[str, str]]:
    """{a network's name: (backbone, attention)}, those of one backbone next to each other."""
    return {
        f"{name}_{attention}" if attention else name: (name, attention)
        for name, backbone in backbones.items()
        for attention in backbone.attentions
    }


def list_models() -> list[str]:
    """Every classifier's name: plain, `_ma`, `_nma` and `_cbam` of a backbone next to each other."""
    return list(_names(_BACKBONES))


def split_name(name: str) -> tuple[str, str]:
    """("resnet50", "ma") of "resnet50_ma"; the attention is "" for a plain network.

    Raises:
        ValueError: no such model.
    """
    names = _names(_BACKBONES)
    if name not in names:
        raise ValueError(f"There is no model {name!r}; choose one of: {', '.join(names)}.")
    return names[name]


def human_name(name: str) -> tuple[str, str]:
    """("ResNet-34", "mask attention (MA)") of "resnet34_ma".

    Raises:
        ValueError: no such model.
    """
    backbone, attention = split_name(name)
    return _BACKBONES[backbone].title, ATTENTIONS[attention]


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
    return _BACKBONES[backbone].build(attention, num_classes, in_channels)


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


def _ours(module: str, network: str, *args) -> Callable[[str, int, int], nn.Module]:
    """Builds `network(*args, attention, num_classes, in_channels)` of a module here, which is imported only then."""

    def build(attention: str, num_classes: int, in_channels: int) -> nn.Module:
        return getattr(import_module(f".{module}", __package__), network)(*args, attention, num_classes, in_channels)

    return build


register_backbone("efficientnet_lite0", "EfficientNet-Lite0", _ours("efficientnet_lite", "EfficientNetLite"))
register_backbone("resnet34", "ResNet-34", _ours("resnet", "ResNet", "resnet34"))
register_backbone("resnet50", "ResNet-50", _ours("resnet", "ResNet", "resnet50"))
register_backbone("vgg16", "VGG-16", _ours("vgg", "VGG"))
register_backbone("inception_v3", "Inception v3", _ours("inception", "Inception"))
