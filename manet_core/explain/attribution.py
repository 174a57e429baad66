"""The explainers of captum, which ask what the network says of changed pictures: LIME, SHAP, occlusion, gradients.

All explain logits, and all compare the picture with the same one without anything to see (`absent`), which the mask
beside it does not follow: what is explained is what the network sees inside the lungs, as in deletion and insertion.
What speaks against a class, a negative attribution, becomes zero, as Grad-CAM's ReLU has it.

None of them hooks into the network. Samples are drawn with fixed seeds, and the random generators of PyTorch and NumPy
are as before afterwards; since they are the process's, whoever draws from them in another thread at the same moment
disturbs KernelSHAP and GradientSHAP.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from ..networks import runtime
from .library import AskedOnce, BindMask
from .progress import report

SUPERPIXELS = 30  # in both lungs: a lobe is about six, and a lesion of a tenth of the lungs is three
SAMPLES = 300  # ten a superpixel; with five, LIME's maps by two seeds correlated 0.78 on an X-ray
LIME_WIDTH = 0.25  # of the kernel that weighs LIME's samples, as its authors' program has it for pictures
WINDOWS = 7  # occluding windows in a row if they did not overlap: as wide as a cell of Grad-CAM's map at 224 pixels
STEPS = 32  # of integrated gradients: their sum is then within 7 % of the logit's gain on an X-ray (64: 2 %)
SHAP_SAMPLES = 32  # of GradientSHAP: as many gradients as integrated gradients take
GREYS = 5  # from which GradientSHAP draws what replaces the lungs
BATCH = 16  # pictures that go through the network together
GRADIENT_BATCH = 4  # the same where gradients are wanted, which hold every layer's features in memory


def absent(image: Tensor, level: float | None = None) -> Tensor:
    """The picture with nothing to see: what is not black has one grey.

    Args:
        image: (1, 1, S, S) in [-1, 1]; -1, the smallest, is black, as all is outside the lungs where these alone are
            shown.
        level: quantile in [0, 1] of the greys that are not black, to be that grey; None: their mean.

    Returns:
        (1, 1, S, S); a black picture stays as it is.
    """
    seen = image > image.min()
    if not seen.any():
        return image.clone()
    greys = image[seen]
    return torch.where(seen, greys.mean() if level is None else greys.quantile(level), image)


def superpixels(image: Tensor) -> Tensor:
    """What is not black of a picture (1, 1, S, S), cut into about `SUPERPIXELS` pieces by scikit-image's SLIC.

    Returns:
        (1, 1, S, S) int64, numbered from 0. What is black belongs to no piece and has the number 0, too: where all
        pictures are black, it changes nothing.
    """
    from skimage.segmentation import slic  # not before: see `_captum`

    picture = image[0, 0].detach().cpu().double().numpy()
    seen = picture > picture.min()
    if not seen.any():
        return torch.zeros_like(image, dtype=torch.long)
    pieces = slic(picture, SUPERPIXELS, compactness=0.1, channel_axis=None, mask=seen, start_label=1)
    _, numbers = np.unique(pieces[pieces > 0], return_inverse=True)
    pieces[pieces > 0] = numbers
    return torch.from_numpy(pieces).long().to(image.device)[None, None]


class _Watched(BindMask):
    """Reports how many of all `pictures` the network has been shown."""

    def __init__(self, net: nn.Module, mask: Tensor, pictures: int):
        super().__init__(net, mask)
        self.pictures, self.shown = pictures, 0

    def forward(self, image: Tensor) -> Tensor:
        answer = super().forward(image) if image.requires_grad else self._without_gradient(image)
        self.shown += len(image)
        report(min(1.0, self.shown / self.pictures))
        return answer

    def _without_gradient(self, image: Tensor) -> Tensor:
        """The same by whatever is quickest; see `networks.runtime`."""
        with torch.inference_mode():
            features = runtime.features(self.net, image, self.mask.expand(len(image), -1, -1, -1))
            answer = self.net.forward_head(features)
        return answer.clone()  # one that may be computed with outside


@contextmanager
def _seeded() -> Iterator[None]:
    """Within it PyTorch and NumPy draw what they draw after seed 0; afterwards they go on as if nothing had been."""
    numbers = np.random.get_state()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            np.random.set_state(numbers)


def _captum():
    import captum.attr  # not before: it takes seconds, and the default explainer does without

    return captum.attr


def _each_class(
    net: nn.Module, image: Tensor, mask: Tensor, features: Tensor, attribute: Callable[[Tensor, Tensor, int], Iterator]
) -> tuple[Tensor, Tensor]:
    """Logits (K,), and the maps (K, S, S) that `attribute` (image, mask, K) yields, their negative part cut off."""
    with torch.inference_mode(False), torch.enable_grad():
        logits = net.forward_head(features.clone())[0].detach()
        image, mask = image.clone(), mask.clone()
        maps = [each.detach()[0, 0].float() for each in attribute(image, mask, len(logits))]
    return logits, torch.stack(maps).relu()


def integrated_gradients(net: nn.Module, image: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Integrated gradients (Sundararajan 2017) from the `absent` picture; an explainer's function, see `Explainer`."""

    def attribute(image: Tensor, mask: Tensor, classes: int) -> Iterator[Tensor]:
        method = _captum().IntegratedGradients(_Watched(net, mask, classes * STEPS))
        for k in range(classes):
            yield method.attribute(image, absent(image), target=k, n_steps=STEPS, internal_batch_size=GRADIENT_BATCH)

    return _each_class(net, image, mask, features, attribute)


def gradient_shap(net: nn.Module, image: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """GradientSHAP (Lundberg 2017), from pictures of one grey each, as dark and as bright as the picture's own are.

    No noise is added to the picture: outside the lungs it would show the network what it never saw.
    """

    def attribute(image: Tensor, mask: Tensor, classes: int) -> Iterator[Tensor]:
        method = _captum().GradientShap(_Watched(net, mask, classes * SHAP_SAMPLES))
        levels = [(i + 0.5) / GREYS for i in range(GREYS)]
        greys = torch.cat([absent(image, level) for level in levels])
        for k in range(classes):
            with _seeded():
                parts = [
                    method.attribute(image, greys, n_samples=GRADIENT_BATCH, stdevs=0.0, target=k)
                    for _ in range(SHAP_SAMPLES // GRADIENT_BATCH)
                ]
            yield torch.stack(parts).mean(0)

    return _each_class(net, image, mask, features, attribute)


def occlusion(net: nn.Module, image: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the logit falls when a window is made `absent`, over all windows that cover a pixel (Zeiler 2014)."""

    def attribute(image: Tensor, mask: Tensor, classes: int) -> Iterator[Tensor]:
        side = max(1, image.shape[-1] // WINDOWS)
        step = max(1, side // 2)
        in_a_row = 1 + -(-(image.shape[-1] - side) // step)
        model = AskedOnce(_Watched(net, mask, in_a_row**2 + 1))
        method = _captum().Occlusion(model)
        for k in range(classes):
            model.turn = 0
            yield method.attribute(
                image,
                sliding_window_shapes=(1, side, side),
                strides=(1, step, step),
                baselines=absent(image),
                target=k,
                perturbations_per_eval=BATCH,
            )

    return _each_class(net, image, mask, features, attribute)


def lime(net: nn.Module, image: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """LIME (Ribeiro 2016): a ridge regression on which `superpixels` are there, near the picture more than far from it.

    Samples, their weights and the regression are those of its authors' program for pictures.
    """

    def drawn(original: Tensor, num_interp_features: int, **_) -> Iterator[Tensor]:
        present = torch.randint(0, 2, (SAMPLES, num_interp_features), generator=torch.Generator().manual_seed(0))
        present[0] = 1
        yield from present[:, None].to(original.device)

    def nearness(original: Tensor, perturbed: Tensor, present: Tensor, **_) -> Tensor:
        distance = 1 - present.float().mean(1).sqrt()  # cosine distance to the picture, which has all of them
        return (-(distance**2) / (2 * LIME_WIDTH**2)).exp()

    def method(model: nn.Module):
        from captum._utils.models.linear_model import SkLearnRidge  # where captum's own documentation takes it from

        return _captum().Lime(model, SkLearnRidge(alpha=1.0), nearness, drawn)

    return _of_superpixels(net, image, mask, features, method)


def kernel_shap(net: nn.Module, image: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """KernelSHAP (Lundberg 2017): Shapley values of the `superpixels`, from samples of them."""

    def method(model: nn.Module):
        class Drawn(_captum().KernelShap):
            """Draws all samples at once, so that the random generators are touched at no other time."""

            def kernel_shap_perturb_generator(self, original_inp: Tensor, **kwargs) -> Iterator[Tensor]:
                with _seeded():
                    samples = list(islice(super().kernel_shap_perturb_generator(original_inp, **kwargs), SAMPLES))
                yield from samples

        return Drawn(model)

    return _of_superpixels(net, image, mask, features, method)


def _of_superpixels(
    net: nn.Module, image: Tensor, mask: Tensor, features: Tensor, method: Callable
) -> tuple[Tensor, Tensor]:
    def attribute(image: Tensor, mask: Tensor, classes: int) -> Iterator[Tensor]:
        pieces = superpixels(image)
        if pieces.max() < 1:  # one piece or none: nothing to compare
            yield from torch.zeros(classes, *image.shape)
            return
        model = AskedOnce(_Watched(net, mask, SAMPLES))
        explain = method(model)
        surrogate = explain.interpretable_model
        surrogate.fit = _seeded()(surrogate.fit)  # its data loader draws a number, too
        for k in range(classes):
            model.turn = 0
            found = explain.attribute(
                image,
                baselines=absent(image),
                target=k,
                feature_mask=pieces,
                n_samples=SAMPLES,
                perturbations_per_eval=BATCH,
            )
            yield torch.where(image > image.min(), found, 0)

    return _each_class(net, image, mask, features, attribute)
