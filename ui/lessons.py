"""Phantoms drawn for a lesson each: one chest, in which one thing at a time is changed."""

from functools import cache
from html import escape

from manet_core import XRay
from manet_core.phantom import phantom

from .render import data_url

LESSONS = {  # name: (what `phantom` draws beside the chest, what the drawing is for)
    "Nothing to find": ({}, "What do the networks name where no shadow is drawn?"),
    "One shadow": ({"opacity": 1.0}, "Does a heatmap find the shadow?"),
    "The shadow elsewhere": (
        {"opacity": 1.0, "place": "upper left"},
        "Does a heatmap follow when the shadow is in the other lung?",
    ),
    "A shadow in each lung": ({"opacity": 1.0, "place": "both sides"}, "Does a heatmap show both?"),
    "A faint shadow": ({"opacity": 0.2}, "How dense must a shadow be for an answer to change?"),
    "Behind the heart": (
        {"opacity": 1.0, "place": "behind the heart"},
        "What does a network lose that is shown no more than the mask leaves?",
    ),
    "A letter beside the shoulder": ({"marker": True}, "Does an answer change by what lies outside the lungs?"),
}
SIDE = 512
_SEED, _THUMBNAIL = 4, 160
CHOOSE = """
element.addEventListener('click', event => {
  const lesson = event.target.closest('button')?.dataset.lesson;
  if (lesson) trigger('submit', {lesson});
});
"""


def lesson(name: str, size: int = SIDE) -> XRay:
    """The drawing of `LESSONS` of this name, as `phantom` has it."""
    return phantom(size, _SEED, **LESSONS[name][0])


@cache
def gallery() -> str:
    """HTML: a button with a small picture for each lesson."""
    items = "".join(
        f'<li><button data-lesson="{escape(name)}"><img src="{data_url(lesson(name, _THUMBNAIL).pixels)}" alt="">'
        f"<b>{escape(name)}</b><span>{escape(use)}</span></button></li>"
        for name, (_, use) in LESSONS.items()
    )
    return f"""<p class="help">The same chest each time, with one thing changed. Each is a synthetic phantom, not a
person: what networks that were trained on people answer for a drawing shows how they behave, and nothing of how often
they are right.</p><ul class="gallery">{items}</ul>"""
