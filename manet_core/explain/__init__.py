"""Heatmaps: which pixels spoke for a class. A registry of explainers, all of one signature.

`register_explainer` adds one from outside; pipeline, report, command line and page offer whatever is registered.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .attention import attention, has_attention
from .attribution import gradient_shap, integrated_gradients, kernel_shap, lime, occlusion
from .gradcam import grad_cam
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
    """

    name: str
    title: str
    function: Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    slow: bool = False
    suits: Callable[[nn.Module], bool] = lambda net: True


_EXPLAINERS: dict[str, Explainer] = {}


def register_explainer(name: str, title: str, function: Callable, slow: bool = False, **options) -> Explainer:
    """Add an explainer (see `Explainer`); its name must be new.

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
register_explainer("hirescam", "HiResCAM", explain_with("HiResCAM"))
register_explainer("layercam", "LayerCAM", explain_with("LayerCAM"))
register_explainer("layercam-finer", "LayerCAM, one block earlier", explain_with("LayerCAM", "finer_block"))
register_explainer("gradcam++", "Grad-CAM++", explain_with("GradCAMPlusPlus"))
register_explainer("eigencam", "Eigen-CAM", explain_with("EigenCAM"))
register_explainer("scorecam", "Score-CAM", explain_with("ScoreCAM"), slow=True)
register_explainer("attention", "The network's own attention", attention, suits=has_attention)
register_explainer("lime", "LIME", lime, slow=True)
register_explainer("kernelshap", "KernelSHAP", kernel_shap, slow=True)
register_explainer("gradientshap", "GradientSHAP", gradient_shap, slow=True)
register_explainer("occlusion", "Occlusion", occlusion, slow=True)
register_explainer("integratedgradients", "Integrated gradients", integrated_gradients, slow=True)
