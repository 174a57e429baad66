"""MANet: lung segmentation, classification with mask attention, and heatmaps for chest X-rays."""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {  # loaded when first asked for: torch takes seconds, in which `python -m manet_core` must heed Ctrl-C
    "CLASSES": "tasks",
    "Analysis": "pipeline",
    "Pipeline": "pipeline",
    "Reading": "pipeline",
    "WeightsError": "weights",
    "XRay": "files.xray",
    "XRayError": "files.xray",
    "create_classifier": "networks.registry",
    "create_segmenter": "networks.registry",
    "list_models": "networks.registry",
    "list_tasks": "tasks",
    "load_xray": "files.xray",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
