from .files.xray import XRay as XRay
from .files.xray import XRayError as XRayError
from .files.xray import load_xray as load_xray
from .networks.registry import create_classifier as create_classifier
from .networks.registry import create_segmenter as create_segmenter
from .networks.registry import list_models as list_models
from .pipeline import Analysis as Analysis
from .pipeline import Pipeline as Pipeline
from .pipeline import Reading as Reading
from .table import to_frame as to_frame
from .tasks import CLASSES as CLASSES
from .tasks import list_tasks as list_tasks
from .weights import WeightsError as WeightsError

__version__: str
