"""Heatmaps: which pixels spoke for a class. A registry of explainers, all of one signature.

`register_explainer` adds one from outside; pipeline, report, command line and page offer whatever is registered.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .attention import attention, has_attention
from .attribution import SUPERPIXELS, WINDOWS, gradient_shap, integrated_gradients, kernel_shap, lime, occlusion
from .gradcam import by_gradient, by_positive_gradient, finer_cam, grad_cam
from .library import explain_with

DEFAULT = "gradcam"


@dataclass(frozen=True)
class Explainer:
    """One way to explain a network's logits.

    Attributes:
        name: how command line and API refer to it.
        title: how people write it.
        function: (net, image (1, 1, S, S), mask (1, 1, S, S), features (1, C, h, w) of `net.forward_features`) ->
            (logits (K,), maps (K, h, w)), one map for each class, raw and ≥ 0; (h, w) is the explainer's to choose.
        slow: it takes many seconds or minutes, so whoever calls it should show its progress.
        suits: whether it can explain a network; `function` raises a `ValueError` of one sentence where it cannot.
        note: a sentence for whoever reads its heatmaps; "" where they have as many cells as (h, w) says.
    """

    name: str
    title: str
    function: Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    slow: bool = False
    suits: Callable[[nn.Module], bool] = lambda net: True
    note: str = ""


_EXPLAINERS: dict[str, Explainer] = {}


def register_explainer(name: str, title: str, function: Callable, slow: bool = False, **options) -> Explainer:
    """Add an explainer (see `Explainer`, which takes `options`, too); its name must be new.

    Raises:
        ValueError: there is an explainer of this name already.
    """
    if name in _EXPLAINERS:
        raise ValueError(f"There is an explainer {name!r} already.")
    _EXPLAINERS[name] = Explainer(name, title, function, slow, **options)
    return _EXPLAINERS[name]


def get_explainer(name: str) -> Explainer:
    """The explainer of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _EXPLAINERS:
        raise ValueError(f"There is no explainer {name!r}; choose one of: {', '.join(_EXPLAINERS)}.")
    return _EXPLAINERS[name]


def list_explainers() -> list[str]:
    """The names of all explainers, the default first."""
    return list(_EXPLAINERS)


register_explainer(DEFAULT, "Grad-CAM", lambda net, image, mask, features: grad_cam(net, features))
register_explainer("hirescam", "HiResCAM", lambda net, image, mask, features: grad_cam(net, features, by_gradient))
register_explainer(
    "layercam", "LayerCAM", lambda net, image, mask, features: grad_cam(net, features, by_positive_gradient)
)
register_explainer(
    "layercam-finer",
    "LayerCAM, one block earlier",
    lambda net, image, mask, features: finer_cam(net, image, mask, by_positive_gradient),
)
register_explainer("gradcam++", "Grad-CAM++", explain_with("GradCAMPlusPlus"))
register_explainer("eigencam", "Eigen-CAM", explain_with("EigenCAM"))
register_explainer("scorecam", "Score-CAM", explain_with("ScoreCAM"), slow=True)
register_explainer(
    "attention",
    "The network's own attention",
    attention,
    suits=has_attention,
    note="It shows where the network looks, before it decides: the same for every class.",
)
_SUPERPIXELS = f"It tells about {SUPERPIXELS} superpixels of the lungs from each other, and nothing within one."
register_explainer("lime", "LIME", lime, slow=True, note=_SUPERPIXELS)
register_explainer("kernelshap", "KernelSHAP", kernel_shap, slow=True, note=_SUPERPIXELS)
_PIXELS = "It weighs each pixel on its own and looks grainy: only a region in which many agree means something."
register_explainer("gradientshap", "GradientSHAP", gradient_shap, slow=True, note=_PIXELS)
_WINDOWS = f"It was made with windows of 1/{WINDOWS} of the picture's side, and shows nothing finer."
register_explainer("occlusion", "Occlusion", occlusion, slow=True, note=_WINDOWS)
register_explainer("integratedgradients", "Integrated gradients", integrated_gradients, slow=True, note=_PIXELS)
