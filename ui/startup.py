"""Gradio, imported in half of the time.

Wherever a component is defined, Gradio parses its source file to keep a type
stub beside it up to date. That takes seconds at every start, and helps editors alone.
"""

import os
from types import ModuleType
from unittest.mock import patch


def import_gradio_quickly() -> ModuleType:
    """The module gradio, without analytics, and without its parsing its own source files."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with patch("inspect.getfile", side_effect=OSError):  # "this component has no file", which Gradio provides for
        import gradio
    return gradio


gr = import_gradio_quickly()


def bare_html(value: str = "", **options) -> gr.HTML:
    """HTML without Gradio's own style."""
    return gr.HTML(value, apply_default_css=False, **options)
