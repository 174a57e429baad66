"""MANet: lung segmentation, classification with mask attention, and heatmaps for chest X-rays."""

from .pipeline import Analysis, Pipeline, Reading
from .registry import CLASSES, create_classifier, create_segmenter, list_models
from .weights import WeightsError
from .xray import XRay, XRayError, load_xray

__version__ = "0.1.0"

__all__ = [
    "CLASSES",
    "Analysis",
    "Pipeline",
    "Reading",
    "WeightsError",
    "XRay",
    "XRayError",
    "create_classifier",
    "create_segmenter",
    "list_models",
    "load_xray",
]
