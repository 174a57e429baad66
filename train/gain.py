"""Attention mining, the indirect guidance: whatever the network did not attend to shall not tell the class.

Li et al., *Tell Me Where to Look: Guided Attention Inference Network* (GAIN),
CVPR 2018, whose equations are cited below. Grad-CAM of the true class is part
of the computation here: the part of the X-ray that it shows is erased, and the
probability that the true class still has is the loss. It can fall only if the
attention covers everything that speaks for the class, so its gradient passes
through the attention, and through the gradients that the attention is made of.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OMEGA, SIGMA = 10.0, 0.5  # of eq. 4; neither paper gives their values, so these are ours


def attention(features: Tensor, scores: Tensor) -> Tensor:
    """Grad-CAM, differentiable to second order (eq. 1 and 2): A = ReLU(Σₖ GAP(∂s/∂fₖ) fₖ).

    Args:
        features: (B, C, h, w), which `scores` were computed from.
        scores: (B,) the logit of one class of each picture.

    Returns:
        (B, 1, h, w) float, ≥ 0, raw; with a graph through the features and through the gradients.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), features, create_graph=True)
    weights = _wide(gradient).mean((2, 3), keepdim=True)
    return (weights * _wide(features)).sum(1, keepdim=True).relu()


def threshold(maps: Tensor, size: tuple[int, int], omega: float = OMEGA, sigma: float = SIGMA) -> Tensor:
    """T(A) = sigmoid(ω(A − σ)) (eq. 4): about 1 where a picture is attended to, about 0 elsewhere.

    Args:
        maps: A (B, 1, h, w) ≥ 0; each is scaled to [0, 1] and enlarged to the picture first. A map that is zero
            everywhere stays so.
        size: (H, W) of the picture.
        omega: ω, how sharp the threshold is.
        sigma: σ in [0, 1], where it lies.

    Returns:
        (B, 1, H, W) float in (0, 1).
    """
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    scaled = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).eps)
    return torch.sigmoid(omega * (F.interpolate(scaled, size, mode="bilinear") - sigma))


def erased(image: Tensor, maps: Tensor, omega: float = OMEGA, sigma: float = SIGMA) -> Tensor:
    """I* = I − T(A) ⊙ I (eq. 3): the picture without what was attended to, which becomes mid-grey, 0 in [−1, 1].

    Args:
        image: I (B, C, H, W) float in [−1, 1].
        maps: A (B, 1, h, w) ≥ 0.
    """
    return image - threshold(maps, image.shape[-2:], omega, sigma) * image


def remaining(
    net: nn.Module,
    image: Tensor,
    mask: Tensor | None,
    features: Tensor,
    logits: Tensor,
    true: Tensor,
    omega: float = OMEGA,
    sigma: float = SIGMA,
) -> Tensor:
    """What eq. 5 averages: the probability of the true class that is left when what speaks for it is erased.

    GAIN's "prediction score" is the softmax probability here: it is bounded, so the loss cannot run away. The erased
    pictures leave no trace in the running statistics of batch norms, with which real X-rays will be read.

    Args:
        net: a `manet_core.networks.classifier.Classifier`.
        image: (B, C, H, W) float in [−1, 1].
        mask: (B, 1, H, W) float in [0, 1]; None for a network that needs none.
        features: (B, C', h, w), `net.forward_features(image, mask)`, with a graph.
        logits: (B, K), `net.forward_head(features)`.
        true: (B,) int64 class numbers.

    Returns:
        (B,) float32 (float64 of a float64 network) in [0, 1].
    """
    maps = attention(features, logits.gather(1, true[:, None])[:, 0])
    with _running_statistics_kept(net):
        left = net(erased(image, maps, omega, sigma), mask)
    return _wide(left).softmax(1).gather(1, true[:, None])[:, 0]


def _wide(x: Tensor) -> Tensor:
    """Float32, where autocast left less."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def _running_statistics_kept(net: nn.Module) -> Iterator[None]:
    """Within it no batch norm of `net` updates its running mean and variance, whatever mode it is in."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
