"""A network's own attention as a heatmap, as the paper on AlexNet with attention shows it (Li, Ma, Yan 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def has_attention(net: nn.Module) -> bool:
    """Whether a network attends to places of its own features: AlexNet's Attn 1, 2 and 3."""
    return getattr(net, "attention", "") in ("attn1", "attn2", "attn3")


def attention(net: nn.Module, image: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (K,) and the mean of the network's attention maps (K, h, w), an explainer's function (see `Explainer`).

    Each layer's map sums to 1; enlarged to the grid of the finest one it does so again, so that all layers weigh the
    same. A network attends before it decides: the map is the same for every class.

    Raises:
        ValueError: the network has no attention maps.
    """
    if not has_attention(net):
        raise ValueError("This network has no attention maps of its own; choose another explainer.")
    with torch.inference_mode():
        logits = net.forward_head(features)[0]
        layers = net.local_attention(image, mask)
        finest = max(layer.shape[-2:] for layer in layers)
        enlarged = [F.interpolate(layer, finest, mode="bilinear")[0, 0] for layer in layers]
        mean = torch.stack([layer / layer.sum() for layer in enlarged]).mean(0)
    return logits.clone(), mean.clone().expand(len(logits), -1, -1)
