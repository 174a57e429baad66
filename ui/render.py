"""HTML of the page: the four pictures, the cards, warnings. All text is escaped, all pictures are PNG data URLs.

A card's heatmap is a small picture with an alpha channel that the browser lays
over the X-ray: choosing another class sends heatmaps alone, and the opacity
needs no server at all.
"""

import base64
import io
from collections import Counter
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from manet_core import CLASSES, Analysis, Reading
from manet_core.pipeline import DISCLAIMER
from manet_core.preprocess import resize
from manet_core.registry import ATTENTIONS, human_name, split_name
from manet_core.report import COLOUR_MAP

PREDICTED = "predicted"  # explain what each network predicts, instead of one class
EXPLAIN = [("Each network’s prediction", PREDICTED), *((name, name) for name in CLASSES)]
STYLE = Path(__file__).with_name("style.css")

_SIDE = 1024  # pixels, long side of the four pictures
_CARD_SIDE = 512
_COLOURS = (matplotlib.colormaps[COLOUR_MAP](np.arange(256)) * 255).round().astype(np.uint8)  # (256, 4)
_ALPHA = bytes(np.minimum(255, np.arange(256) * 2).astype(np.uint8))  # the cold half fades, so that the X-ray shows

HEADER = f"""
<header class="head"><h1>MANet</h1><p>A second opinion for chest X-rays</p>
<p class="disclaimer">{DISCLAIMER}</p></header>
"""

EMPTY = """
<section class="empty">
<h2>Drop a frontal chest X-ray above</h2>
<p>PNG, JPEG, TIFF, BMP, WebP or DICOM, up to 200 MB. The analysis starts by itself and takes some seconds.</p>
<ol><li><b>The lungs:</b> found in the X-ray, tidied up, and cut out.</li>
<li><b>The readings:</b> each network sees the lungs alone and shares 100% among five classes.</li>
<li><b>The heatmaps:</b> where in the picture a network found what speaks for a class.</li></ol>
<p class="small">The X-ray stays on the computer that runs this page. The file is deleted as soon as it is read,
and no name, date or history is kept.</p>
</section>
"""

LIMITS = f"""
<section class="limits" aria-label="What the numbers leave out"><p><b>{DISCLAIMER}</b>
The five probabilities of a network sum to 100%: it must choose among five answers. Effusion, pneumothorax, nodules,
heart failure and all else are not among them, and a high “Normal” says nothing of them.</p>
<p>The training X-rays tie each class to its source: bacterial and viral pneumonia come from children, tuberculosis and
COVID-19 from adults of other hospitals. A high number may thus be reading the age or the hospital.</p></section>
"""


_STOPS = ",".join(f"rgb({r},{g},{b})" for r, g, b, _ in _COLOURS[[0, 32, 64, 96, 128, 160, 192, 224, 255]].tolist())
LEGEND = f"""
<div class="legend"><span>weakest</span><i style="background:linear-gradient(90deg,{_STOPS})"></i>
<span>strongest place of the same heatmap; each panel has its own scale</span></div>
"""


def stage(text: str) -> str:
    """A line that says what is being done."""
    return f'<p class="stage" role="status"><span class="spinner" aria-hidden="true"></span>{escape(text)}</p>'


def alert(title: str, sentences: list[str]) -> str:
    """A box of plain sentences, "" where there are none."""
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="alert" role="alert"><b>⚠ {escape(title)}</b><ul>{items}</ul></div>'


def data_url(picture: np.ndarray | Image.Image) -> str:
    """A PNG data URL of a PIL image, or of (H, W) in [0, 1], float or bool, in grey."""
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray((picture * np.float32(255)).round().astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat_picture(heatmap: np.ndarray) -> Image.Image:
    """A heatmap (h, w) in [0, 1] in colour, the lower the more transparent."""
    picture = Image.fromarray((heatmap * np.float32(255)).round().astype(np.uint8), "L")
    picture.putpalette(_COLOURS[:, :3].tobytes(), "RGB")
    picture.info["transparency"] = _ALPHA
    return picture


def fit(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of a picture of `shape`, scaled down to at most `side` pixels, never up."""
    scale = min(1.0, side / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def pictures(analysis: Analysis) -> str:
    """The four pictures side by side, and the X-ray that lies under the cards' heatmaps."""
    height, width = analysis.original.shape
    size = fit((height, width), _SIDE)
    original = resize(analysis.original, size)
    raw, cleaned = analysis.segmentation.raw_at(size), analysis.segmentation.at(size)
    area = f"area {analysis.segmentation.cleaned.mean():.0%}"
    four = [
        ("Original", f"{width}×{height} pixels", original),
        ("Predicted mask", "as the network draws it", raw),
        ("Post-processed mask", f"cleaned; {area}", cleaned),
        ("Segmented lungs", "what the networks read", original * cleaned),
    ]
    figures = "".join(
        f'<figure><button class="zoom" title="Full screen, on and off"><img src="{data_url(picture)}" '
        f'width="{size[1]}" height="{size[0]}" alt="{title} ({note})"></button>'
        f"<figcaption><b>{title}</b> {note}</figcaption></figure>"
        for title, note, picture in four
    )
    small = fit((height, width), _CARD_SIDE)
    under = f"background-image:url({data_url(resize(original, small))});--ratio:{width / height:.4f}"
    style = f"<style>#cards .card .xray{{{under}}}</style>"
    return f'{style}<section class="pictures" aria-label="The four pictures">{figures}</section>'


def summary(readings: dict[str, Reading]) -> str:
    """How many networks predict what, and what the numbers leave out."""
    if not readings:
        text = "There are weights for no classifier, so that the lungs are all there is to see."
    else:
        votes = Counter(reading.predicted for reading in readings.values()).most_common()
        text = ", ".join(f"<b>{escape(name)}</b> by {count} of {len(readings)}" for name, count in votes)
        text = f"Predicted: {text} networks"
    return f'<h2 class="summary">{text}</h2>{LIMITS}'


def cards(readings: dict[str, Reading], explain: str = PREDICTED) -> str:
    """One card a network: a row for each backbone, columns plain, MA, CBAM.

    Args:
        readings: {model: Reading}, of one analysis.
        explain: the class whose heatmaps are shown, or `PREDICTED`.
    """
    rows, columns = [], list(ATTENTIONS)
    used = sorted({columns.index(split_name(model)[1]) for model in readings})
    places = []
    for model in readings:
        backbone, attention = split_name(model)
        if backbone not in rows:
            rows.append(backbone)
        places.append((rows.index(backbone) + 1, used.index(columns.index(attention)) + 1))
    body = "".join(_card(m, r, explain, place) for (m, r), place in zip(readings.items(), places))
    return f'<section class="cards" style="--columns:{max(1, len(used))}" aria-label="Readings">{body}</section>'


def notes(readings: dict[str, Reading]) -> str:
    """How to read the heatmaps, and how not to."""
    if not readings:
        return ""
    native = sorted({"{}×{}".format(*reading.native) for reading in readings.values()})
    return f"""
<div class="notes"><p>Each heatmap (Grad-CAM) is scaled on its own: its brightness cannot be compared with another
panel’s. The raw peak can, among the classes of one network. A heatmap has {escape(", ".join(native))} cells, whatever
its outline suggests.
<b>In lung</b> is the share of the heatmap inside the mask; mask attention (MA) sets what lies outside the lungs to
zero, so that its share is high partly by construction, and no proof of better reasoning.</p></div>
"""


def _card(model: str, reading: Reading, explain: str, place: tuple[int, int]) -> str:
    backbone, attention = human_name(model)
    name = reading.predicted if explain == PREDICTED else explain
    peak, in_lung = reading.peaks[name], reading.in_lung[name]
    figures = f"raw peak {peak:.3g}, {in_lung:.0%} in lung"
    if attention == ATTENTIONS["ma"]:
        figures += " (MA: partly by construction)"
    if peak <= 0:
        figures = "empty, no place speaks for this class"
    rows = "".join(_bar(c, p, c == reading.predicted) for c, p in reading.probabilities.items())
    return f"""
<article class="card" style="grid-area:{place[0]}/{place[1]}">
<h3>{escape(backbone)} <span>{"" if attention == "plain" else "+ "}{escape(attention)}</span></h3>
<p class="verdict"><b>{escape(reading.predicted)}</b> {reading.probabilities[reading.predicted]:.1%}</p>
<figure><button class="zoom" title="Full screen, on and off"><span class="xray"><img class="heat"
src="{data_url(heat_picture(reading.heatmaps[name]))}"
alt="Heatmap of {escape(name)} by {escape(backbone)}, {escape(attention)}, over the X-ray: {figures}"></span></button>
<figcaption>Heatmap of <b>{escape(name)}</b>: {figures}</figcaption></figure>
<table><caption class="unseen">Probabilities of {escape(backbone)}, {escape(attention)}</caption>{rows}</table>
</article>"""


def _bar(name: str, probability: float, predicted: bool) -> str:
    mark = ' class="top"' if predicted else ""
    bar = f'<td class="bar" aria-hidden="true"><div><i style="width:{probability:.1%}"></i></div></td>'
    return f'<tr{mark}><th scope="row">{escape(name)}</th>{bar}<td>{probability:.1%}</td></tr>'
