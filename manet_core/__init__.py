"""MANet: lung segmentation, classification with mask attention, and heatmaps for chest X-rays."""

from .files.xray import XRay, XRayError, load_xray
from .networks.registry import create_classifier, create_segmenter, list_models
from .pipeline import Analysis, Pipeline, Reading
from .tasks import CLASSES, list_tasks
from .weights import WeightsError

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
    "list_tasks",
    "load_xray",
]
