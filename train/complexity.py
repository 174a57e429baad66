"""What a network costs, counted as the paper counts it (MANet, Table 3)."""

import torch
from torch import nn

from manet_core import create_classifier


def count_parameters(net: nn.Module) -> int:
    """Number of learnt parameters."""
    return sum(p.numel() for p in net.parameters())


def count_flops(net: nn.Module, size: int = 512) -> int:
    """Operations for one image of size×size, with the mask pyramid.

    Multiply-accumulates of convolutions (with their bias) and linear layers, 2 an element of a batch norm, k·k + 1
    an output of adaptive average pooling, and 1 an element of a mask attention map. The rest is not counted.
    """
    total = 0

    def add(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * (module.weight[0].numel() + (module.bias is not None))
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * output.numel()
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            (height, width), (h, w) = inputs[0].shape[-2:], output.shape[-2:]
            total += output.numel() * ((height // h) * (width // w) + 1)

    handles = [module.register_forward_hook(add) for module in net.modules()]
    try:
        blank = torch.zeros(1, 1, size, size, device=next(net.parameters()).device)
        with torch.inference_mode():
            net(blank, blank)
    finally:
        for handle in handles:
            handle.remove()
    return total + count_map_elements(net, size)


def count_map_elements(net: nn.Module, size: int = 512) -> int:
    """Elements of the mask pyramid of one mask of size×size; 0 without mask attention.

    Normalised mask attention counts the same: the pyramid of the all-lung mask depends on the size alone.
    """
    return sum(m.numel() for m in net.attention_maps(torch.zeros(1, 1, size, size)))


def last_map(net: nn.Module, size: int) -> float | None:
    """The largest value, in [0, 1], of the last map of a mask of size×size that is all lung; None without maps.

    Average pooling counts the zeros that a convolution pads with, so that every padded layer fades the map from its
    rim inwards, and the faster the smaller it is: Inception v3's is 0.43 at most at 299 pixels, 1e-10 at 80. What the
    last map multiplies is all that the head sees: a network whose last map is next to nothing cannot learn.
    Normalised mask attention keeps it at 1.
    """
    maps = net.attention_maps(torch.ones(1, 1, size, size))
    return float(maps[-1].max()) if maps else None


def table_3(name: str, size: int = 512) -> dict[str, int]:
    """{"parameters", "flops", "map_elements"} of a classifier, without allocating its weights."""
    with torch.device("meta"):
        net = create_classifier(name).eval()
    return {
        "parameters": count_parameters(net),
        "flops": count_flops(net, size),
        "map_elements": count_map_elements(net, size),
    }
