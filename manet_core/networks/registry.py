"""Names to networks: one row a family, that is a backbone and the attentions that one paper gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ..tasks import CLASSES

if TYPE_CHECKING:  # a list of names need not wait for PyTorch
    from torch import nn

MANET = ("", "ma", "nma", "cbam")  # the attentions that MANet compares
ATTENTIONS = {
    "": "plain",
    "ma": "mask attention (MA)",
    "nma": "normalised mask attention",
    "cbam": "CBAM",
    "attn1": "attention after one layer",
    "attn2": "attention after two layers",
    "attn3": "attention after three layers",
    "guided": "guided attention",
    "e2e": "end to end",
}


class Spec(NamedTuple):
    """What is known of a network by its name.

    Attributes:
        backbone: the name before the attention's.
        attention: of `ATTENTIONS`; "" for the plain network.
        title: how people write the backbone.
        build: (attention, num_classes, in_channels) -> the network with random weights.
        num_classes: width of the logits in its paper.
        size: side of the square input in its paper, pixels.
        sees: what it is shown, of `preprocess.SEES`: "lungs", or the "whole" X-ray.
    """

    backbone: str
    attention: str
    title: str
    build: Callable[[str, int, int], nn.Module]
    num_classes: int
    size: int
    sees: str

    @property
    def uses_mask(self) -> bool:
        """Whether the network computes with the mask that it is given; all others accept and ignore it."""
        return self.attention in ("ma", "nma", "guided")


_NETWORKS: dict[str, Spec] = {}


def register_backbone(
    name: str,
    title: str,
    build: Callable[[str, int, int], nn.Module],
    attentions: Sequence[str] = MANET,
    num_classes: int = len(CLASSES),
    size: int = 512,
    sees: str = "lungs",
) -> None:
    """Add a backbone: `name`, `name_ma`, `name_nma` and `name_cbam` are networks from then on.

    A backbone that there is can be given further attentions, with a `build` of their own.

    Args:
        name: of the backbone; none of its networks may have a name that is taken.
        title: how people write it, "ResNet-34".
        build: (attention, num_classes, in_channels) -> `networks.classifier.Classifier` with random weights. Called
            when a network is made, so that it can leave slow imports until then.
        attentions: those of `ATTENTIONS` that it can have, "" for the plain network.
        num_classes, size, sees: see `Spec`.

    Raises:
        ValueError: a name that is taken, or an attention that there is not.
    """
    if unknown := [attention for attention in attentions if attention not in ATTENTIONS]:
        raise ValueError(f"There is no attention {unknown[0]!r}; choose from: {', '.join(map(repr, ATTENTIONS))}.")
    new = {
        f"{name}_{attention}" if attention else name: Spec(name, attention, title, build, num_classes, size, sees)
        for attention in ATTENTIONS
        if attention in attentions
    }
    if clash := [network for network in new if network in _NETWORKS]:
        raise ValueError(f"There is a model {clash[0]!r} already.")
    _NETWORKS.update(new)


def list_models() -> list[str]:
    """Every classifier's name, those of one family next to each other."""
    return list(_NETWORKS)


def spec(name: str) -> Spec:
    """What is known of the network of this name.

    Raises:
        ValueError: no such model.
    """
    if name not in _NETWORKS:
        raise ValueError(f"There is no model {name!r}; choose one of: {', '.join(_NETWORKS)}.")
    return _NETWORKS[name]


def split_name(name: str) -> tuple[str, str]:
    """("resnet50", "ma") of "resnet50_ma"; the attention is "" for a plain network.

    Raises:
        ValueError: no such model.
    """
    return spec(name)[:2]


def human_name(name: str) -> tuple[str, str]:
    """("ResNet-34", "mask attention (MA)") of "resnet34_ma".

    Raises:
        ValueError: no such model.
    """
    return spec(name).title, ATTENTIONS[spec(name).attention]


def create_classifier(name: str, num_classes: int | None = None, in_channels: int = 1) -> nn.Module:
    """A classifier with random weights: net(image, mask) -> logits.

    Args:
        name: one of `list_models()`.
        num_classes: width of the logits; None: as in its paper.
        in_channels: channels of the image; X-rays have one.

    Raises:
        ValueError: no such model.

    Example:
        >>> import torch
        >>> net = create_classifier("resnet34_ma").eval()
        >>> net(torch.zeros(2, 1, 224, 224), torch.ones(2, 1, 224, 224)).shape
        torch.Size([2, 5])
    """
    chosen = spec(name)
    return chosen.build(chosen.attention, chosen.num_classes if num_classes is None else num_classes, in_channels)


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
register_backbone(
    "alexnet", "AlexNet", _ours("alexnet", "AlexNet"), ("", "attn1", "attn2", "attn3"), 1, size=299, sees="whole"
)
for backbone, title in (("efficientnet_lite0", "EfficientNet-Lite0"), ("resnet34", "ResNet-34")):
    register_backbone(backbone, title, _ours("e2e", "EndToEnd", backbone), ("e2e",), size=256, sees="whole")

# the paper's ten, each at its own input size, and EfficientNet-Lite0
for _name, _title, _size in (
    ("mobilenetv2", "MobileNetV2", 224),
    ("densenet121", "DenseNet-121", 224),
    ("efficientnet_b0", "EfficientNet-B0", 224),
    ("efficientnet_b1", "EfficientNet-B1", 240),
    ("efficientnet_b3", "EfficientNet-B3", 300),
    ("efficientnet_b5", "EfficientNet-B5", 456),
    ("vgg16", "VGG-16", 224),
    ("resnet50v2", "ResNet-50 V2", 224),
    ("inception_v3", "Inception v3", 299),
    ("inception_resnet_v2", "Inception-ResNet v2", 299),
    ("efficientnet_lite0", "EfficientNet-Lite0", 224),
):
    register_backbone(_name, _title, _ours("guided", "Guided", _name), ("guided",), 3, _size, sees="whole")
