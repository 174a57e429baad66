"""The tab that compares attentions: every class by plain, MA and CBAM; the mask pyramid; what if the networks saw
something else, or another mask?"""

import base64
import binascii
import io
import zlib
from collections.abc import Iterator
from functools import lru_cache
from html import escape

import gradio as gr
import numpy as np
import torch
from PIL import Image

from manet_core import CLASSES, Analysis, Reading, XRay, create_classifier
from manet_core.lungs import Lungs
from manet_core.networks.registry import human_name, split_name
from manet_core.preprocess import network_input, resize

from .networks import Networks
from .render import alert, data_url, heat_picture

SEES = [
    ("the lungs, as always", "lungs"),
    ("all but the lungs", "outside"),
    ("the lungs’ pixels, shuffled", "shuffled"),
    ("the lungs, equalised", "equalised"),
    ("the lungs’ outline alone", "shape"),
    ("the whole picture", "whole"),
]
_SIDE = 224  # of the mask that is drawn on, and of the pictures
_NOTHING_YET = """
<section class="empty"><h2>First analyse an X-ray, or a phantom, under “Second opinion”</h2>
<p>Then this page takes it apart: every class by every attention, the pyramid of masks, and what the networks say when
they see something else.</p></section>
"""
_BRUSH = """
<div class="brush">
<label><input type="radio" name="brush" value="draw" checked> add lung</label>
<label><input type="radio" name="brush" value="erase"> take lung away</label>
<label>brush <input type="range" name="width" min="4" max="60" value="20" aria-label="Width of the brush"></label>
</div>
"""
_DRAW = """
const start = async () => {
  const canvas = element.querySelector('canvas');
  if (!canvas || canvas.dataset.ready) return;
  canvas.dataset.ready = 'yes';
  const mask = new Image();
  mask.src = canvas.dataset.mask;
  await mask.decode();
  const pen = canvas.getContext('2d');
  pen.drawImage(mask, 0, 0);
  pen.lineCap = pen.lineJoin = 'round';
  pen.strokeStyle = canvas.dataset.colour;
  let last = null;
  const place = event => {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;  // it is a square
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  const line = event => {
    if (!last) return;
    const here = place(event);
    pen.lineWidth = element.querySelector('[name=width]').value;
    pen.globalCompositeOperation =
      element.querySelector('[value=erase]').checked ? 'destination-out' : 'source-over';
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...here);
    pen.stroke();
    last = here;
  };
  canvas.addEventListener('pointerdown', event => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    line(event);
  });
  canvas.addEventListener('pointermove', line);
  canvas.addEventListener('pointerup', () => {
    last = null;
    trigger('submit', {mask: canvas.toDataURL()});
  });
};
new MutationObserver(start).observe(element, {childList: true, subtree: true});
start();
"""


def painted(mask: np.ndarray) -> Image.Image:
    """A mask (S, S) bool in the accent colour, transparent elsewhere."""
    picture = Image.fromarray(mask.astype(np.uint8), "P")
    picture.putpalette(bytes([0, 0, 0, 108, 197, 217]), "RGB")
    picture.info["transparency"] = bytes([0, 255])
    return picture


def drawn_mask(url: str) -> np.ndarray | None:
    """The mask (S, S) bool of a canvas, a PNG data URL whose opaque pixels are lung; None if it is not one."""
    head, _, data = str(url).partition(",")
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG"])
        if not head.startswith("data:image/png") or picture.size != (_SIDE, _SIDE):
            return None
        return np.asarray(picture.convert("RGBA"))[..., 3] > 127
    except (OSError, ValueError, binascii.Error, SyntaxError):
        return None


def editor(analysis: Analysis, mask: np.ndarray) -> str:
    """The X-ray with the mask over it, to be drawn on."""
    under = data_url(resize(analysis.original, _SIDE))
    return f"""{_BRUSH}<div class="film" style="background-image:url({under})"><canvas width="{_SIDE}" height="{_SIDE}"
data-mask="{data_url(painted(mask))}" data-colour="rgb(108,197,217)" role="img"
aria-label="The lung mask over the X-ray; draw on it with the brush"></canvas></div>"""


def grid(analysis: Analysis, backbone: str, sees: str, random: bool) -> str:
    """A table of heatmaps: a row for each attention of one backbone, a column for each class."""
    names = [name for name in analysis.readings if split_name(name)[0] == backbone]
    mask = analysis.segmentation.at(_SIDE)
    seen = network_input(resize(analysis.original, _SIDE), mask, sees, np.random.default_rng(0))
    head = "".join(f'<th scope="col">{label}</th>' for label in CLASSES)
    rows = ""
    for name in names:
        attention, r = escape(human_name(name)[1]), analysis.readings[name]
        cells = "".join(_cell(r, label, attention) for label in CLASSES)
        rows += f'<tr><th scope="row">{attention}<br>predicts<br><b>{escape(r.predicted)}</b></th>{cells}</tr>'
    what = {key: text for text, key in SEES}[sees]
    note = "The networks have RANDOM weights: a heatmap that looks the same as before explains nothing. " * random
    native = "×".join(map(str, analysis.readings[names[0]].native))
    return f"""<section class="grid" style="--seen:url({data_url((seen + 1) / 2)})">
<p>{note}They see <b>{what}</b>. A heatmap has {native} cells and a scale of its own; peaks compare the classes of one
network.</p><div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>
</section>"""


def _cell(r: Reading, label: str, attention: str) -> str:
    top = ' class="top"' if label == r.predicted else ""
    figures = f"{r.probabilities[label]:.1%}, peak {r.peaks[label]:.2g}, {r.in_lung[label]:.0%} in lung"
    return f"""<td{top}><span class="seen"><img class="heat" src="{data_url(heat_picture(r.heatmaps[label]))}"
alt="Heatmap of {label} by {attention}"></span>{figures}</td>"""


@lru_cache(maxsize=64)
def receptive_fields(name: str, size: int) -> tuple[int, ...]:
    """Side, in pixels, of what the middle cell of each map of an `_ma` network sees of a mask of `size`."""
    net, mask = create_classifier(name), torch.ones(1, 1, size, size, requires_grad=True)
    sides = []
    for m in net.attention_maps(mask):
        (gradient,) = torch.autograd.grad(m[0, 0, m.shape[2] // 2, m.shape[3] // 2], mask, retain_graph=True)
        sides.append(int((gradient[0, 0].abs().sum(0) > 0).sum()))
    return tuple(sides)


def pyramid(net: torch.nn.Module, name: str, mask: np.ndarray) -> str:
    """The last mask map of each resolution of an `_ma` network, each with a sentence."""
    with torch.inference_mode():
        device = next(net.parameters()).device
        maps = net.attention_maps(torch.from_numpy(mask.astype(np.float32))[None, None].to(device))
    fields = receptive_fields(name, mask.shape[0])
    last = {m.shape[-1]: (m[0, 0].float().cpu().numpy(), field) for m, field in zip(maps, fields)}
    figures = ""
    for side, (values, field) in last.items():
        silent, dimmed = (values == 0).mean(), ((values > 0) & (values < 0.995)).mean()
        large = np.asarray(Image.fromarray(values).resize((_SIDE, _SIDE), Image.Resampling.NEAREST))
        figures += f"""<figure><img src="{data_url(np.clip(large, 0, 1))}" alt="Mask map of {side}×{side} cells">
<figcaption><b>{side}×{side}</b> A cell sees {field}×{field} pixels of the {mask.shape[0]}×{mask.shape[0]}: features
are silenced in {silent:.0%} of the cells, dimmed in {dimmed:.0%}, passed in {1 - silent - dimmed:.0%}.</figcaption>
</figure>"""
    return f"""<section class="pyramid"><h2>The mask pyramid of {escape(human_name(name)[0])}</h2>
<p>Mask attention pools the mask as each layer pools the features, and multiplies: white passes, black silences.</p>
<div>{figures}</div></section>"""


def teach_tab(networks: Networks, found: gr.State, tab: gr.Tab) -> None:
    """Fill the `tab` that is being built; `found` holds the X-ray's `Analysis`, or None."""

    def redraw(analysis, edited, backbone, sees, random) -> Iterator[dict]:
        if analysis is None:
            yield {shown: _NOTHING_YET, work: gr.update(visible=False), maps: ""}
            return
        backbones = list(dict.fromkeys(split_name(name)[0] for name in analysis.readings))
        if not backbones:
            yield {shown: alert("Nothing to compare", ["There are weights for no classifier."])}
            return
        backbone = backbone if backbone in backbones else backbones[0]
        key = zlib.crc32(analysis.original)
        if edited is None or edited[0] != key:
            edited = None
        mask = analysis.segmentation.at(_SIDE) if edited is None else edited[1]
        chosen = gr.update(choices=[(human_name(b)[0], b) for b in backbones], value=backbone)
        yield {work: gr.update(visible=True), which: chosen}
        asked = [name for name in analysis.readings if split_name(name)[0] == backbone]
        lungs = Lungs(mask.astype(np.float32), mask)
        what_if = networks.analyze(XRay(analysis.original), random=random, models=asked, lungs=lungs, sees=sees)
        masked = f"{backbone}_ma"
        pipeline = networks.get()
        yield {
            shown: grid(what_if, backbone, sees, random),
            maps: pyramid(pipeline.classifiers[masked], masked, mask) if masked in asked else "",
            canvas: editor(analysis, mask),
        }

    def keep(analysis: Analysis | None, event: gr.EventData) -> tuple | None:
        mask = drawn_mask(event.mask)
        return None if analysis is None or mask is None else (zlib.crc32(analysis.original), mask)

    with gr.Column(visible=False) as work:
        with gr.Row(equal_height=True):
            which = gr.Radio([], label="Backbone", min_width=180)
            sees = gr.Radio(SEES, value="lungs", label="What the networks see", scale=4)
            random = gr.Checkbox(label="Random weights", min_width=140)
        with gr.Accordion("What if the mask were another? Draw on it", open=False, elem_id="what-if"):
            canvas = gr.HTML(apply_default_css=False, js_on_load=_DRAW, elem_id="canvas")
            again = gr.Button("The predicted mask again", size="sm")
    shown = gr.HTML(_NOTHING_YET, apply_default_css=False, elem_id="grid")
    maps = gr.HTML(apply_default_css=False, elem_id="pyramid")
    edited = gr.State(time_to_live=1800)  # (which X-ray, mask)
    event = {"show_progress": "hidden", "api_visibility": "private"}
    fields = [found, edited, which, sees, random], [work, which, shown, maps, canvas]
    turns = {"concurrency_id": "teaching", "concurrency_limit": 4}
    changes = [tab.select, *(control.input for control in (which, sees, random))]
    gr.on(changes, redraw, *fields, trigger_mode="always_last", **turns, **event)
    canvas.submit(keep, found, edited, trigger_mode="always_last", **event).then(redraw, *fields, **turns, **event)
    again.click(lambda: None, None, edited, **event).then(redraw, *fields, **turns, **event)
