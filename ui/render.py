"""HTML of the page: the readings, the words around them, warnings. All text is escaped, all pictures are PNG data URLs.

Films, masks and heatmaps are drawn by the viewer, see viewer.py.
"""

import base64
import io
from datetime import datetime
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from manet_core import Analysis, Reading
from manet_core.explain import get_explainer, list_explainers
from manet_core.networks.registry import ATTENTIONS, human_name, split_name
from manet_core.pipeline import DISCLAIMER
from manet_core.preprocess import WHOLE
from manet_core.report import COLOUR_MAP
from manet_core.tasks import Task, get_task

STYLE = Path(__file__).with_name("style.css")

MASKED = ("ma", "nma")  # attentions that are the lung mask itself
_BY_MASK = {"ma": "MA", "nma": "MA", "guided": "guidance by the mask", "e2e": "its own mask"}  # what dims the outside
SHORT = {"": "plain", "ma": "MA", "nma": "nMA", "cbam": "CBAM", "e2e": "end to end"}  # for the head of a narrow column
_COLOURS = (matplotlib.colormaps[COLOUR_MAP](np.arange(256)) * 255).round().astype(np.uint8)  # (256, 4)
_ALPHA = bytes(np.minimum(255, np.arange(256) * 2).astype(np.uint8))  # the cold half fades, so that the X-ray shows

HEADER = f"""
<a class="skip" href="#stage">To the film and its reading</a>
<header class="head"><h1>MANet</h1><p>A second opinion for chest X-rays</p>
<p class="disclaimer">{DISCLAIMER}</p></header>
"""

EMPTY = """
<section class="empty">
<h2>Drop a frontal chest X-ray here, or choose a file above</h2>
<p>PNG, JPEG, TIFF, BMP, WebP or DICOM, up to 200 MB. The analysis starts by itself and takes some seconds.</p>
<ol><li><b>Lung segmentation:</b> the lungs are found in the X-ray, the mask is cleaned, and the lungs are cut out.</li>
<li><b>Classification:</b> each network is shown the lungs alone, or the whole X-ray where its paper has it so, and
gives each of its classes a probability.</li>
<li><b>Heatmaps:</b> where in the picture a network found evidence for a class.</li></ol>
<p class="small">The X-ray stays on the computer that runs this page. The uploaded file is deleted as soon as it is
read; the last ten films and their readings stay in its memory until shortly after this page is closed, and on no disk.
Nothing of a DICOM header is kept.</p>
</section>
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
    """Why a file is not analysed, and what is shown all the same: the X-ray `kept`, None if there is none."""
    below = [] if kept is None else [f"Still shown is the X-ray before it{f', {kept}' if kept else ''}."]
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


def heat_picture(heatmap: np.ndarray) -> Image.Image:
    """A heatmap (h, w) in [0, 1] in colours, the lower the more transparent."""
    picture = Image.fromarray((heatmap * np.float32(255)).round().astype(np.uint8), "L")
    picture.putpalette(_COLOURS[:, :3].tobytes(), "RGB")
    picture.info["transparency"] = _ALPHA
    return picture


def fit(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of a picture of `shape`, scaled down to at most `side` pixels, never up."""
    scale = min(1.0, side / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def shown_name(name: str) -> str:
    """A class as people write it."""
    return name.replace("_", " ")


def titles(model: str) -> tuple[str, str, str]:
    """Backbone and attention as people write them, and the attention's key, of a network of the manifest."""
    try:
        return *human_name(model), split_name(model)[1]
    except ValueError:  # a manifest may name its networks as it likes
        return model, ATTENTIONS[""], ""


def called(model: str) -> str:
    backbone, attention, key = titles(model)
    return f"{backbone} ({attention})" if key else backbone


def choices(task: Task) -> list[tuple[str, str]]:
    """(label, value) of the classes of a task."""
    return [(shown_name(name), name) for name in task.classes]


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


def readings(analysis: Analysis) -> str:
    """For each task a table of probabilities: a row for each class, a column for each network, and one for their mean.

    Each network's is a button that has the viewer show the heatmap of that class by that network; those at the head,
    of what the network predicts. A mean has no heatmap.
    """
    return "".join(_readings(get_task(name), analysis) for name in analysis.tasks)


def _readings(task: Task, analysis: Analysis) -> str:
    readings, mean, titled = analysis.readings_of(task.name), analysis.mean_of(task.name), len(analysis.tasks) > 1
    backbones = {titles(model)[0] for model in readings}
    title = escape(task.title) if titled else "Probabilities"
    if len(backbones) == 1:
        title += f" by {escape(*backbones)}"
    paper = f" <span>{escape(task.paper)}</span>" if titled else ""
    head, body = "", ""
    for model in readings:
        backbone, attention, key = titles(model)
        short = escape(SHORT.get(key, attention))
        short = short if len(backbones) == 1 else f"{escape(backbone)}<br>{short}"
        says = f"{escape(backbone)}, {escape(attention)}: heatmap of what it predicts"
        head += (
            f'<th scope="col"><button data-network="{escape(model)}" aria-pressed="false" title="{says}" '
            f'tabindex="-1">{short}</button></th>'
        )
    several = len(readings) > 1
    if several:
        head += f'<th scope="col" class="mean" title="Mean of the {len(readings)} networks"><span>mean</span></th>'
    for name in task.classes:
        cells = "".join(_probability(model, reading, name) for model, reading in readings.items())
        if several:
            highest = " top" * (task.exclusive and mean[name] == max(mean.values()))
            cells += f'<td class="mean{highest}"><span style="--share:{mean[name]:.1%}">{mean[name]:.1%}</span></td>'
        body += f'<tr><th scope="row">{escape(shown_name(name))}</th>{cells}</tr>'
    return f"""
<table class="readings"><caption>{title}{paper}</caption>
<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"""


def _probability(model: str, reading: Reading, name: str) -> str:
    probability, top = reading.probabilities[name], ' class="top"' if name in reading.present else ""
    backbone, attention, _ = titles(model)
    says = f"{escape(backbone)}, {escape(attention)}: heatmap of {escape(shown_name(name))}"
    return (
        f'<td{top}><button data-network="{escape(model)}" data-name="{escape(name)}" aria-pressed="false" '
        f'title="{says}" tabindex="-1" style="--share:{probability:.1%}">{probability:.1%}</button></td>'
    )


def figures(model: str, reading: Reading, name: str) -> str:
    """What is told of a network's heatmap of a class."""
    peak, in_lung, (right, left), key = (
        reading.peaks[name], reading.in_lung[name], reading.in_sides[name], titles(model)[2],
    )  # fmt: skip
    if peak <= 0:
        return "empty, no evidence for this class anywhere"
    told = f"raw peak {peak:.3g}, {in_lung:.0%} in lung (right {right:.0%}, left {left:.0%})"
    return told + (f", with {_BY_MASK[key]} partly by construction" if key in _BY_MASK else "")


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
at all (the pyramid under “Compare attention” counts these places). A high share is thus partly construction and no
proof of better reasoning, and a heatmap may still peak in a corner.</p></div>
"""
