"""What the viewer needs: its HTML, and films, masks and heatmaps for the page that asked, and no other.

What it does with them is in viewer.js.
"""

import base64
import io
import json
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from manet_core import Analysis, XRay
from manet_core.explain import DEFAULT
from manet_core.files.stored import Stored
from manet_core.heatmap_means import HeatmapMean, alike, small
from manet_core.lungs import sides
from manet_core.report import COLOUR_MAP

from . import render
from .claims import claimed
from .networks import Film
from .shelves import KEPT, Picture

SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
MOST_PIXELS = 9_500_000  # of a film that is sent as it is; larger ones are halved until they have no more
COLOUR_MAPS = [COLOUR_MAP, "viridis", "cividis", "jet"]  # jet only to compare with papers: it invents edges
DIFFERENCE = "coolwarm"  # of a heatmap from the mean, which is in the middle
FETCH = "/film"  # where a page fetches a film's values
_MASK_SIDE = 1024

# (what to do, its text, its key, whether it can be on, whether it needs the networks' answer); see ACTIONS in viewer.js
_BUTTONS = [
    [
        ("layout:film", "Film", "A", True, False),
        ("layout:stages", "Stages", "S", True, True),
        ("layout:networks", "Networks", "N", True, True),
        ("layout:mean", "Mean", "E", True, True),
    ],
    [
        ("heat", "Heatmap", "H", True, True),
        ("mask", "Mask", "M", True, True),
        ("outline", "Outline", "O", True, True),
        ("lungs", "Lungs", "L", True, True),
    ],
    [("fit", "Fit", "0", False, False), ("one", "1:1", "1", False, False)],
    [("tool:ruler", "Ruler", "D", True, False), ("tool:ratio", "CTR", "C", True, False)],
    [("screen", "Full screen", "F", False, False), ("help", "Keys", "?", False, False)],
]
_WINDOW = [("invert", "Invert", "I", True, False), ("reset", "Reset", "R", False, False)]
_TITLES = {
    "layout:mean": "Heatmap, mean of many films, difference",
    "tool:ratio": "Cardiothoracic ratio",
    "lungs": "Lungs alone",
    "reset": "Window as at first",
}
_KEYS = [
    ("wheel, + −", "zoom at the pointer; zoom"),
    ("drag, Shift and arrows", "move"),
    ("0 · 1", "the whole film · pixel for pixel"),
    ("right-drag", "window: across for the width, up and down for the centre"),
    ("[ ] · , .", "narrower, wider · centre down, up"),
    ("I · R", "invert · window as at first"),
    ("← → · ↑ ↓", "network · class"),
    ("H M O L", "heatmap, mask, its outline, lungs alone"),
    ("A · S · N", "film · the four stages · all networks"),
    ("E", "the heatmap, the mean over many films, the difference"),
    ("D · C", "ruler · heart and thorax, for the cardiothoracic ratio"),
    ("Backspace · Esc", "take the last line away · put the tool away"),
    ("F · ?", "full screen · these keys"),
]
TOKEN = "() => { try { return sessionStorage.getItem('manet') ?? ''; } catch { return ''; } }"  # see shelves.py
COURIER = "watch('value', () => dispatchEvent(new CustomEvent('manet-{}', {{detail: props.value}})));"


def _buttons(group: list[tuple[str, str, str, bool, bool]], tabindex: int) -> str:
    buttons = ""
    for action, text, key, held, needs in group:
        more = (' aria-pressed="false"' if held else "") + (" data-needs disabled" if needs else "")
        title = _TITLES.get(action, text)
        buttons += (
            f'<button data-do="{action}" title="{title} ({escape(key)})" aria-label="{title}" tabindex="{tabindex}"'
            f"{more}>{text}</button>"
        )
    return buttons


def _toolbar() -> str:
    """All buttons but the window's; of these only one at a time is a stop of the tab key."""
    groups = "".join(f"<span>{_buttons(group, 0)}</span>" for group in _BUTTONS)
    return f'<div class="toolbar" role="toolbar" aria-label="Viewer">{groups}</div>'


def shell() -> str:
    """The viewer before it has a film."""
    colours = {
        name: base64.b64encode(
            (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes()
        ).decode()
        for name in (*COLOUR_MAPS, DIFFERENCE)
    }
    keys = "".join(f"<tr><th scope='row'>{key}</th><td>{text}</td></tr>" for key, text in _KEYS)
    maps = "".join(f"<option>{name}</option>" for name in COLOUR_MAPS)
    return f"""
<div class="viewer" data-colours="{escape(json.dumps(colours))}" data-kept="{KEPT}"
data-difference="{DIFFERENCE}">{render.EMPTY}
{_toolbar()}
<div class="stage" id="stage" tabindex="0" role="application" aria-label="X-ray; press ? for its keys"><canvas></canvas>
<svg aria-hidden="true"></svg><div class="labels"></div><p class="badge" role="status"></p>
<p class="failed" role="alert"></p>
<p class="told-place"><span class="place"></span><span class="window-text"></span><span class="zoom-text"></span></p>
<p class="measured" role="status"></p>
<dialog class="help-keys" aria-label="Keys"><table>{keys}</table>
<p>Keys count while the film, its buttons or the readings have the focus.</p></dialog></div>
<div class="under"><div class="sliders"><label>Centre <input type="range" name="level" step="any"></label>
<label>Width <input type="range" name="width" step="any"></label>
<span>{_buttons(_WINDOW, 0)}</span>
<label>Heatmap <input type="range" name="opacity" min="0" max="1" step="0.05" value="0.6"></label>
<label><span class="unseen">Colours of heatmaps</span><select name="colours">{maps}</select></label>
<label><span class="unseen">Scale of heatmaps</span><select name="scale"><option value="own">each its own scale</option>
<option value="shared">one scale for all</option></select></label></div>
<p class="heat-line"><span class="legend"><span>weakest</span><i class="legend-bar"></i><span>strongest</span></span>
<span class="explained"></span></p></div>
<ul class="strip" aria-label="Films of this page" hidden></ul></div>
"""


def picture(x: XRay, key: str, name: str) -> Picture:
    """A film as the viewer gets it; its values are (height, width) of one byte each, or of two if "deep", lower first.

    Args:
        x: the X-ray; without `stored`, its pixels are the values.
        key: by which its layers will name it, and the viewer fetches its values: random.
        name: its file's.
    """
    stored = x.stored or Stored.of(x.pixels)
    levels, shrunk = stored.levels, 1
    while levels.size > MOST_PIXELS:
        height, width = (side // 2 * 2 for side in levels.shape)
        levels = levels[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3)).astype(np.uint16)
        shrunk *= 2
    deep = bool(levels.max() > 255)
    rows, columns = x.pixels.shape
    film = {
        "key": key, "name": name, "rows": rows, "columns": columns,
        "height": levels.shape[0], "width": levels.shape[1], "shrunk": shrunk, "deep": deep,
        "first": stored.first, "step": stored.step, "inverted": stored.inverted,
        "start": [(value - stored.first) / stored.step for value in stored.window],
        "spacing": x.spacing and vars(x.spacing),
    }  # fmt: skip
    return Picture(json.dumps(film), levels.astype("<u2" if deep else np.uint8).tobytes())


def films_text(pictures: list[Picture], key: str) -> str:
    """Films for the viewer, as JSON; it shows the one of that key and puts the others beside those it has."""
    return f'{{"open": {json.dumps(key)}, "films": [{", ".join(picture.text for picture in pictures)}]}}'


def layers_text(
    film: Film, whole: list[str], heatmaps: bool, means: dict[str, dict[str, HeatmapMean]] | None = None
) -> str:
    """A film's masks and heatmaps for the viewer, as JSON.

    Args:
        film: it.
        whole: networks that are shown the whole X-ray; all others are shown the lungs alone.
        heatmaps: whether they may be seen.
        means: {network: {class: what its heatmap is compared with}}; None: nothing.
    """
    analysis, size = film.analysis, render.fit(film.shape, _MASK_SIDE)
    lungs = analysis.segmentation
    right, left = (side.mean() for side in sides(lungs.cleaned))
    others = [render.called(model) for model in analysis.readings if model in whole]
    but = f"; the whole X-ray is shown to {', '.join(others)}" if others else ""
    found = {
        "film": film.key,
        "claim": claimed(analysis),
        "lead": next((name for task in analysis.tasks for name in analysis.leading_of(task)), ""),
        "area": f"cleaned; area {right + left:.0%} (right {right:.0%}, left {left:.0%})",
        "seen": f"what the classifiers are shown{but}",
        "raw": _soft(lungs.raw_at(size)),
        "mask": _soft(lungs.at(size)),
        "networks": [_network(analysis, model, means or {}) for model in analysis.readings] if heatmaps else [],
    }
    return json.dumps(found)


def _network(analysis: Analysis, model: str, means: dict[str, dict[str, HeatmapMean]]) -> dict:
    means = means.get(model, {}) if analysis.explainer == DEFAULT else {}
    reading, (top, left, bottom, right) = analysis.readings[model], analysis.readings[model].box
    return {
        "name": model,
        "title": ", ".join(render.titles(model)[:2]),
        "task": reading.task,
        "predicted": reading.predicted,
        "box": [left, top, right - left, bottom - top],
        "classes": {
            name: {
                "shown": render.shown_name(name),
                "probability": f"{reading.probabilities[name]:.1%}",
                "heat": render.data_url(heatmap),
                "peak": reading.peaks[name],
                "note": render.figures(model, reading, name),
            }
            | ({"mean": _beside_mean(heatmap, means[name])} if name in means and reading.peaks[name] > 0 else {})
            for name, heatmap in reading.heatmaps.items()
        },
    }


def _beside_mean(heatmap: np.ndarray, of: HeatmapMean) -> dict:
    """A heatmap's mean, the difference from it, the middle of whose range is none, and how alike the two are."""
    own = small(heatmap)
    correlation = f"correlation {alike(own, of.mean) or 0:.2f}"
    return {
        "films": of.films,
        "mean": render.data_url(of.mean),
        "difference": render.data_url(np.clip((1 + own - of.mean) / 2, 0, 1)),
        "note": f"{correlation} with the mean; half of {of.films} validation X-rays: {of.alike:.2f} or more",
    }


def _soft(mask: np.ndarray) -> str:
    """A mask (H, W) bool as a grey PNG, its edge softened, so that its outline is smooth where it is enlarged."""
    from scipy.ndimage import gaussian_filter  # not before: no start need wait for it

    soft = gaussian_filter(mask.astype(np.float32), 1)
    buffer = io.BytesIO()
    Image.fromarray((soft * 255).round().astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
