"""MANet: lung segmentation, classification with mask attention, and heatmaps for chest X-rays."""

import lazy_loader

__version__ = "0.1.0"

# A name's module is imported when the name is first used: PyTorch takes seconds, and reading a file does not need it.
# `__init__.pyi` lists the names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
