"""HTML of the page: the four pictures, the cards, warnings. All text is escaped, all pictures are PNG data URLs.

A card's heatmap is a small picture with an alpha channel that the browser lays
over the X-ray or the segmented lungs: choosing another class, colour map or
scale sends heatmaps alone; opacity, window and inversion need no server at all.
"""

import base64
import io
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion

from manet_core import Analysis, Reading
from manet_core.explain import get_explainer, list_explainers
from manet_core.lungs import Lungs, sides
from manet_core.networks.registry import ATTENTIONS, human_name, split_name
from manet_core.pipeline import DISCLAIMER
from manet_core.preprocess import WHOLE, Box, resize
from manet_core.report import COLOUR_MAP
from manet_core.tasks import Task, get_task

PREDICTED = "predicted"  # explain what each network predicts, instead of one class
STYLE = Path(__file__).with_name("style.css")

_CARD_SIDE = 512
_ACCENT = (108, 197, 217)
MASKED = ("ma", "nma")  # attentions that are the lung mask itself
_BY_MASK = {"ma": "MA", "nma": "MA", "guided": "guidance by the mask", "e2e": "its own mask"}  # what dims the outside
COLOUR_MAPS = [COLOUR_MAP, "viridis", "cividis", "jet"]  # jet only to compare with papers: it invents edges
OWN, SHARED = "own", "shared"
SCALES = [("each panel its own", OWN), ("one for all panels", SHARED)]
_COLOURS = {
    name: (matplotlib.colormaps[name](np.arange(256)) * 255).round().astype(np.uint8) for name in COLOUR_MAPS
}  # (256, 4) each
_STOPS = [0, 32, 64, 96, 128, 160, 192, 224, 255]
_ALPHA = bytes(np.minimum(255, np.arange(256) * 2).astype(np.uint8))  # the cold half fades, so that the X-ray shows

WINDOW = """
<svg class="unseen" aria-hidden="true"><filter id="window" color-interpolation-filters="sRGB"><feComponentTransfer>
<feFuncR type="linear"/><feFuncG type="linear"/><feFuncB type="linear"/></feComponentTransfer></filter></svg>
"""  # grey level -> slope · level + intercept; the page's sliders set both

HEADER = f"""
<header class="head"><h1>MANet</h1><p>A second opinion for chest X-rays</p>
<p class="disclaimer">{DISCLAIMER}</p></header>
"""

EMPTY = """
<section class="empty">
<h2>Drop a frontal chest X-ray above</h2>
<p>PNG, JPEG, TIFF, BMP, WebP or DICOM, up to 200 MB. The analysis starts by itself and takes some seconds.</p>
<ol><li><b>Lung segmentation:</b> the lungs are found in the X-ray, the mask is cleaned, and the lungs are cut out.</li>
<li><b>Classification:</b> each network is shown the lungs alone, or the whole X-ray where its paper has it so, and
gives each of its classes a probability.</li>
<li><b>Heatmaps:</b> where in the picture a network found evidence for a class.</li></ol>
<p class="small">The X-ray stays on the computer that runs this page. The file is deleted as soon as it is read,
and no name, date or history is kept.</p>
</section>
"""


@dataclass(frozen=True)
class View:
    """How heatmaps are shown: the class they explain, or `PREDICTED`; a colour map; a scale, `OWN` or `SHARED`.

    Networks whose task lacks the class show what they predict.
    """

    explain: str = PREDICTED
    colours: str = COLOUR_MAP
    scale: str = OWN


def legend(view: View) -> str:
    """What the colours mean."""
    stops = ",".join(f"rgb({r},{g},{b})" for r, g, b, _ in _COLOURS[view.colours][_STOPS].tolist())
    strongest = "of the same heatmap; each panel has its own scale" if view.scale == OWN else "of all panels"
    return f"""
<div class="legend"><span>weakest</span><i style="background:linear-gradient(90deg,{stops})"></i>
<span>strongest place {strongest}</span></div>
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


def refusal(name: str, sentence: str, kept: str | None) -> str:
    """Why a file is not analysed, and what is shown below it all the same: the X-ray `kept`, None if there is none."""
    below = [] if kept is None else [f"Below is still the X-ray before it{f', {kept}' if kept else ''}."]
    return alert(f"{name or 'The file'} was not analysed", [sentence, *below])


def told(name: str, read_at: datetime, sha256: str) -> str:
    """Which film a reading is of: its file's name, when it was read, the hash of its pixels."""
    return ", ".join(
        [*([name] if name else []), f"read {read_at:%Y-%m-%d %H:%M:%S %Z}", f"pixels SHA-256 {sha256[:16]}…"]
    )


def provenance(name: str, read_at: datetime, sha256: str) -> str:
    """`told` as a line of the page, the whole hash at a hover."""
    return f'<p class="read" title="SHA-256 of the pixels: {sha256}">{escape(told(name, read_at, sha256))}</p>'


def withheld(reasons: list[str]) -> str:
    """A headline that names no class, and why; "" where there is no reason."""
    if not reasons:
        return ""
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    title = '<h2 class="summary"><b>No reliable reading</b></h2>'
    return f'<section class="withheld" role="alert">{title}<ul>{items}</ul></section>'


def data_url(picture: np.ndarray | Image.Image) -> str:
    """A PNG data URL of a PIL image, or of (H, W) in [0, 1], float or bool, in grey."""
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray((picture * np.float32(255)).round().astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat_picture(heatmap: np.ndarray, colours: str = COLOUR_MAP) -> Image.Image:
    """A heatmap (h, w) in [0, 1] in one of `COLOUR_MAPS`, the lower the more transparent."""
    picture = Image.fromarray((heatmap * np.float32(255)).round().astype(np.uint8), "L")
    picture.putpalette(_COLOURS[colours][:, :3].tobytes(), "RGB")
    picture.info["transparency"] = _ALPHA
    return picture


def fit(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of a picture of `shape`, scaled down to at most `side` pixels, never up."""
    scale = min(1.0, side / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def outline(mask: np.ndarray) -> Image.Image:
    """The outline of a mask (H, W) bool in the accent colour, transparent elsewhere."""
    edge = mask ^ binary_erosion(mask, iterations=max(1, max(mask.shape) // 250))
    picture = Image.fromarray(edge.astype(np.uint8), "P")
    picture.putpalette(bytes([0, 0, 0, *_ACCENT]), "RGB")
    picture.info["transparency"] = bytes([0, 255])
    return picture


def film(picture: np.ndarray, shape: tuple[int, int]) -> str:
    """The X-ray alone, before the networks answer.

    Args:
        picture: it, (h, w) float32 in [0, 1], at the size at which it is shown.
        shape: its own (H, W).
    """
    return _stages(picture, [("Original", "{1}×{0} pixels".format(*shape), picture, "radiograph")])


def pictures(picture: np.ndarray, shape: tuple[int, int], lungs: Lungs, whole: list[str]) -> str:
    """The four pictures side by side, and what lies under the cards' heatmaps.

    Args:
        picture, shape: as `film` has them.
        lungs: the masks.
        whole: networks that are shown the whole X-ray; all others are shown the lungs alone.
    """
    size = picture.shape
    raw, cleaned = lungs.raw_at(size), lungs.at(size)
    right, left = (side.mean() for side in sides(lungs.cleaned))
    area = f"area {right + left:.0%} (right {right:.0%}, left {left:.0%})"
    but = f"; the whole X-ray is shown to {', '.join(map(_called, whole))}" if whole else ""
    four = [
        ("Original", "{1}×{0} pixels".format(*shape), picture, "radiograph"),
        ("Predicted mask", "as the network gives it", raw, ""),
        ("Post-processed mask", f"cleaned; {area}", cleaned, ""),
        ("Segmented lungs", escape(f"what the classifiers are shown{but}"), picture * cleaned, "radiograph"),
    ]
    return _stages(picture, four, cleaned)


def _stages(picture: np.ndarray, shown: list[tuple[str, str, np.ndarray, str]], mask: np.ndarray | None = None) -> str:
    """Figures (title, note, picture, CSS class) of one X-ray, the mask's outline over the first of them."""
    (height, width), small = picture.shape, fit(picture.shape, _CARD_SIDE)
    drawn, under = "", [f"--whole:url({data_url(resize(picture, small))})"]
    if mask is not None:
        drawn = f'<img class="outline" src="{data_url(outline(mask))}" alt="">'
        under.append(f"--lungs:url({data_url(resize(picture * mask, small))})")
    figures = "".join(
        f'<figure><button class="zoom" title="Full screen, on and off"><span><img class="{kind}" '
        f'src="{data_url(stage)}" width="{width}" height="{height}" alt="{title} ({note})">'
        f"{drawn if number == 0 else ''}</span></button>"
        f"<figcaption><b>{title}</b> {note}</figcaption></figure>"
        for number, (title, note, stage, kind) in enumerate(shown)
    )
    style = f"<style>.gradio-container{{--ratio:{width / height:.4f};{';'.join(under)}}}</style>"
    return f'{style}<section class="pictures" aria-label="Pictures of the X-ray">{figures}</section>'


def shown_name(name: str) -> str:
    """A class as people write it."""
    return name.replace("_", " ")


def titles(model: str) -> tuple[str, str, str]:
    """Backbone and attention as people write them, and the attention's key, of a network of the manifest."""
    try:
        return *human_name(model), split_name(model)[1]
    except ValueError:  # a manifest may name its networks as it likes
        return model, ATTENTIONS[""], ""


def _called(model: str) -> str:
    backbone, attention, key = titles(model)
    return f"{backbone} ({attention})" if key else backbone


def choices(tasks: list[str]) -> list[tuple[str, str]]:
    """(label, value) of what heatmaps can explain: the predictions, or a class of any of `tasks`."""
    names = dict.fromkeys(name for task in tasks for name in get_task(task).classes)
    return [("Each network’s prediction", PREDICTED), *((shown_name(name), name) for name in names)]


def explainer_choices() -> list[tuple[str, str]]:
    """(label, value) of every explainer."""
    explainers = map(get_explainer, list_explainers())
    return [(explainer.title + (" (slow)" if explainer.slow else ""), explainer.name) for explainer in explainers]


def reading_task(analysis: Analysis) -> Task | None:
    """The task whose classes a student is asked for: the first with one answer; None if no network was run."""
    tasks = [get_task(name) for name in analysis.tasks]
    return next((task for task in tasks if task.exclusive), tasks[0] if tasks else None)


def _titled(task: Task, analysis: Analysis) -> str:
    """A prefix that names the task where there are several."""
    return f"{escape(task.title)}. " if len(analysis.tasks) > 1 else ""


def summary(analysis: Analysis) -> str:
    """For each task, how many networks predict what, and their mean probability of it."""
    if not analysis.readings:
        return '<h2 class="summary">No network was asked; only the lungs were segmented.</h2>'
    return "".join(_summary(get_task(name), analysis) for name in analysis.tasks)


def _summary(task: Task, analysis: Analysis) -> str:
    readings, votes, predicted = analysis.readings_of(task.name).values(), analysis.votes_of(task.name), []
    for name, count in votes.items():
        mean = np.mean([reading.probabilities[name] for reading in readings])
        predicted.append(
            f"<b>{escape(shown_name(name))}</b> by {count} of {len(readings)} (mean probability {mean:.0%})"
        )
    if not task.exclusive:
        start = "Findings of 50% or more"
    elif len(readings) == 1:
        start = "Predicted"
    else:
        start = "The networks agree" if len(votes) == 1 else "The networks disagree"
    return f'<h2 class="summary">{_titled(task, analysis)}{start}: {", ".join(predicted) or "none"}</h2>'


def limits(analysis: Analysis) -> str:
    """What the numbers leave out, by task."""
    paragraphs = "".join(
        f"<p>{_titled(task, analysis)}{escape(task.limits)} {escape(task.sources)}</p>"
        for task in map(get_task, analysis.tasks)
    )
    return f"""
<section class="limits" aria-label="Limits of the numbers"><p><b>{DISCLAIMER}</b></p>{paragraphs}</section>
"""


def verdict(guess: str, votes: dict[str, int], score: tuple[int, int]) -> str:
    """What a student said beside what the networks predict, and how often the two agreed (agreements, X-rays)."""
    predicted = ", ".join(f"{escape(shown_name(name))} by {count}" for name, count in votes.items()) or "nothing"
    agreed, read = score
    return (
        f'<p class="quiz" role="status">You read <b>{escape(shown_name(guess))}</b>; the networks predict '
        f"{predicted}. So far you and most of them agree on <b>{agreed} of {read}</b>. Agreement is not truth: the "
        "networks err, often so on X-rays of other hospitals.</p>"
    )


def cards(analysis: Analysis, view: View) -> str:
    """The legend, then for each task one card a network: a row for each backbone, a column for each attention."""
    several = len(analysis.tasks) > 1
    html = legend(view)
    for name in analysis.tasks:
        task = get_task(name)
        html += f'<h2 class="task">{escape(task.title)} <span>{escape(task.paper)}</span></h2>' if several else ""
        html += _grid(task, analysis.readings_of(name), view, least=3 if several else 1)
    return html


def _grid(task: Task, readings: dict[str, Reading], view: View, least: int) -> str:
    """The cards of one task in columns of at least `least`, so that those of several tasks have one size."""
    rows, columns = [], list(ATTENTIONS)
    used = sorted({columns.index(titles(model)[2]) for model in readings})
    explained = {m: view.explain if view.explain in task.classes else r.predicted for m, r in readings.items()}
    highest = max((r.peaks[explained[model]] for model, r in readings.items()), default=0)
    body = ""
    for model, reading in readings.items():
        backbone, _, attention = titles(model)
        if backbone not in rows:
            rows.append(backbone)
        place = (rows.index(backbone) + 1, used.index(columns.index(attention)) + 1)
        heatmap = reading.heatmaps[explained[model]]
        if view.scale == SHARED and highest > 0:
            heatmap = heatmap * np.float32(reading.peaks[explained[model]] / highest)
        body += _card(model, reading, explained[model], heat_picture(heatmap, view.colours), place)
    label = f"Readings: {escape(task.title)}"
    return f'<section class="cards" style="--columns:{max(least, len(used))}" aria-label="{label}">{body}</section>'


def notes(analysis: Analysis) -> str:
    """How to read the heatmaps, and how not to."""
    if not analysis.readings:
        return ""
    native = sorted({"{}×{}".format(*reading.native) for reading in analysis.readings.values()})
    explainer = get_explainer(analysis.explainer)
    fineness = explainer.note or f"A heatmap has {', '.join(native)} cells, whatever its outline suggests."
    cropped = any(reading.box != WHOLE for reading in analysis.readings.values())
    return f"""
<div class="notes"><p>A heatmap ({escape(explainer.title)}) that is scaled on its own cannot
be compared with another panel’s; its raw peak can, among the classes of one network. {escape(fineness)}
{"A heatmap that ends at a straight edge is of a network that is shown the lungs’ box alone." if cropped else ""}
<b>In lung</b> is the share of the heatmap inside the mask. Mask attention (MA) multiplies every feature by the share of
lung in what that feature covers: what lies outside the lungs is dimmed, and removed only where a feature covers no lung
at all (the pyramid under “Compare attention” counts these places). The share is thus high partly by construction, no
proof of better reasoning, and a heatmap may still peak in a corner.</p></div>
"""


def placed(box: Box) -> str:
    """CSS that puts a heatmap where on the X-ray it belongs."""
    top, left, bottom, right = (100 * edge for edge in box)
    return f"top:{top:.2f}%;left:{left:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"


def _card(model: str, reading: Reading, name: str, heat: Image.Image, place: tuple[int, int]) -> str:
    backbone, attention, key = titles(model)
    peak, in_lung, (right, left) = reading.peaks[name], reading.in_lung[name], reading.in_sides[name]
    figures = f"raw peak {peak:.3g}, {in_lung:.0%} in lung (right {right:.0%}, left {left:.0%})"
    if key in _BY_MASK:
        figures += f", with {_BY_MASK[key]} partly by construction"
    if peak <= 0:
        figures = "empty, no evidence for this class anywhere"
    rows = "".join(_bar(c, p, c in reading.present) for c, p in reading.probabilities.items())
    found = ", ".join(
        f"<b>{escape(shown_name(c))}</b> {reading.probabilities[c]:.1%}"
        for c in sorted(reading.present, key=reading.probabilities.get, reverse=True)
    )
    shown, spoken = escape(shown_name(name)), f"{escape(backbone)}, {escape(attention)}"
    return f"""
<article class="card" style="grid-area:{place[0]}/{place[1]}">
<h3>{escape(backbone)} <span>{"" if attention == "plain" else "+ "}{escape(attention)}</span></h3>
<p class="verdict">{found or "<b>No finding</b> of 50% or more"}</p>
<figure><button class="zoom" title="Full screen, on and off"><span class="xray"><img class="heat"
src="{data_url(heat)}" style="{placed(reading.box)}"
alt="Heatmap of {shown} by {spoken}, over the X-ray: {figures}"></span></button>
<figcaption>Heatmap of <b>{shown}</b>: {figures}</figcaption></figure>
<table><caption class="unseen">Probabilities of {spoken}</caption>{rows}</table>
</article>"""


def _bar(name: str, probability: float, present: bool) -> str:
    mark = ' class="top"' if present else ""
    bar = f'<td class="bar" aria-hidden="true"><div><i style="width:{probability:.1%}"></i></div></td>'
    return f'<tr{mark}><th scope="row">{escape(shown_name(name))}</th>{bar}<td>{probability:.1%}</td></tr>'
