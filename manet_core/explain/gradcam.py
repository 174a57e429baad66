"""Grad-CAM (Selvaraju 2017) of all classes for the price of one forward pass.

Only the gradient of a logit with respect to the last features is needed, so
the backward pass runs through the head alone: the trunk works without a graph.
The result equals pytorch-grad-cam's, which runs the whole network forward and
backward once for each class.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def grad_cam(net: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and class activation maps from the features of the last block.

    Args:
        net: has `forward_head`.
        features: (1, C, h, w), from `net.forward_features`.

    Returns:
        logits (K,) and maps (K, h, w): ReLU of the channels' sum, each weighted
        by the spatial mean of its gradient; raw, not scaled.
    """
    with torch.inference_mode(False), torch.enable_grad():
        features = features.clone().requires_grad_()
        logits = net.forward_head(features)[0]
        gradients = [torch.autograd.grad(logit, features, retain_graph=True)[0][0] for logit in logits]
    features = features.detach()[0]
    maps = [(gradient.mean((1, 2), keepdim=True) * features).sum(0).relu() for gradient in gradients]
    return logits.detach(), torch.stack(maps)


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
