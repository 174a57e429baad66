"""Grad-CAM (Selvaraju 2017), HiResCAM (Draelos 2020) and LayerCAM (Jiang 2021) of all classes for one forward pass.

Only the gradient of a logit with respect to some features is needed, so the
backward pass runs through what comes after them alone: for the last features
that is the head, and the trunk works without a graph. The results equal
pytorch-grad-cam's, which runs the whole network backward once for each class.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Weigh = Callable[[Tensor, Tensor], Tensor]  # gradient and features (C, h, w) -> their product, whose channels are added


def by_mean_gradient(gradient: Tensor, features: Tensor) -> Tensor:
    """Grad-CAM: each channel is weighted by the spatial mean of its gradient."""
    return gradient.mean((1, 2), keepdim=True) * features


def by_gradient(gradient: Tensor, features: Tensor) -> Tensor:
    """HiResCAM: each element is weighted by its own gradient."""
    return gradient * features


def by_positive_gradient(gradient: Tensor, features: Tensor) -> Tensor:
    """LayerCAM: each element is weighted by its own gradient, where that is positive."""
    return gradient.relu() * features


def grad_cam(net: nn.Module, features: Tensor, weigh: Weigh = by_mean_gradient) -> tuple[Tensor, Tensor]:
    """Logits and class activation maps from the features of the last block.

    Args:
        net: has `forward_head`.
        features: (1, C, h, w), from `net.forward_features`.
        weigh: how gradient and features come together.

    Returns:
        logits (K,) and maps (K, h, w): ReLU of the sum over channels; raw, not scaled.
    """
    with torch.inference_mode(False), torch.enable_grad():
        features = features.clone().requires_grad_()
        return _maps(net.forward_head(features)[0], features, weigh)


def finer_cam(net: nn.Module, image: Tensor, mask: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor]:
    """As `grad_cam`, from the features of `net.finer_block`, which have twice the resolution.

    The network has a hook while this runs: one thread at a time may use it.

    Args:
        net: has `finer_block`.
        image: (1, 1, S, S) in [−1, 1].
        mask: (1, 1, S, S) in [0, 1].
        weigh: how gradient and features come together.
    """
    seen = []

    def begin_here(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0].clone()  # what follows may work in place

    with torch.inference_mode(False), torch.enable_grad():
        hook = net.finer_block.register_forward_hook(begin_here)
        try:
            logits = net(image.clone(), mask.clone())[0]
        finally:
            hook.remove()
        return _maps(logits, seen[0], weigh)


def _maps(logits: Tensor, features: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor]:
    gradients = [torch.autograd.grad(logit, features, retain_graph=True)[0][0] for logit in logits]
    features = features.detach()[0]
    return logits.detach(), torch.stack([weigh(gradient, features).sum(0).relu() for gradient in gradients])


def scale_maps(maps: Tensor, size: int) -> np.ndarray:
    """Maps (K, h, w) to heatmaps (K, size, size) float32, each min–max scaled to [0, 1].

    As pytorch-grad-cam does: scaled, enlarged bilinearly, scaled again. A map
    that is zero everywhere stays zero.
    """

    def unit(x: Tensor) -> Tensor:
        x = x - x.amin((1, 2), keepdim=True)
        return x / (1e-7 + x.amax((1, 2), keepdim=True))

    large = F.interpolate(unit(maps)[None], (size, size), mode="bilinear")[0]
    return unit(large).cpu().numpy()
