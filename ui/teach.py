"""The tab that compares attentions: every class by plain, MA and CBAM; the mask pyramid; what the networks predict
when they are shown something else, or another mask."""

import base64
import binascii
import io
import logging
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from html import escape

import numpy as np
import torch
from PIL import Image

from manet_core import Analysis, Reading
from manet_core.explain import DEFAULT, get_explainer
from manet_core.lungs import Lungs
from manet_core.preprocess import View, network_input, resize
from manet_core.tasks import get_task

from .networks import COMPARISONS, Film, Networks
from .newest import Newest, Superseded
from .render import MASKED, alert, data_url, explainer_choices, heat_picture, shown_name, stage, titles, withheld
from .startup import gr

AS_MADE = "as made"  # each network is shown what it is made for
INPUTS = {
    "lungs": "the lungs",
    "outside": "all but the lungs",
    "shuffled": "the lungs’ pixels, shuffled",
    "equalised": "the lungs, equalised",
    "shape": "the lungs’ outline alone",
    "whole": "the whole picture",
}
_SIDE = 224  # of the mask that is drawn on, and of the pictures
_NOTHING_YET = """
<section class="empty"><h2>First analyse an X-ray, or a phantom, under “Second opinion”</h2>
<p>Then this page compares every class by every attention, and shows the pyramid of masks and what the networks predict
when they are shown something else.</p></section>
"""
_BRUSH = """
<div class="brush">
<label><input type="radio" name="brush" value="draw" checked> add lung</label>
<label><input type="radio" name="brush" value="erase"> remove lung</label>
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


def groups(tasks: dict[str, str]) -> dict[str, list[str]]:
    """Networks that can be compared, {title: those of one backbone and one task}, of {network: its task}."""
    found = {}
    for name, task in tasks.items():
        title = titles(name)[0] + (f": {get_task(task).title}" if len(set(tasks.values())) > 1 else "")
        found.setdefault(title, []).append(name)
    return found


def inputs(made_for: set[str]) -> list[tuple[str, str]]:
    """(label, value) of what networks may be shown that are made for these of `INPUTS`; first of all, these."""
    made = " or ".join(text for key, text in INPUTS.items() if key in made_for)
    others = [(text, key) for key, text in INPUTS.items() if {key} != made_for]
    return [(f"{made}, as always", AS_MADE), *others]


def shown_input(picture: np.ndarray, lungs: Lungs, view: View, what: str) -> tuple[np.ndarray, np.ndarray]:
    """What a network was shown of a picture, and the mask that went with it.

    Args:
        picture: the X-ray at (view.working, view.working), in [0, 1].
        lungs: the mask.
        view: how the network is shown it.
        what: the lungs or something else, of `INPUTS`, or `AS_MADE`.

    Returns:
        (S, S) float32 in [−1, 1], and (S, S) bool.
    """
    mask = lungs.at(view.working)
    box = view.box(mask)
    mask = view.cut(mask.astype(np.float32), box) > 0.5
    what = view.sees if what == AS_MADE else what
    return network_input(view.cut(picture, box), mask, what, np.random.default_rng(0)), mask


def grid(analysis: Analysis, inputs: dict[str, np.ndarray], shown: str, random: bool, told: str = "") -> str:
    """A table of heatmaps: a row for each network, a column for each class.

    Args:
        analysis: of networks of one task and one backbone.
        inputs: {model: what it was shown, (S, S) in [−1, 1]}.
        shown: what that is, in words.
        random: the networks have random weights.
        told: sentences about the mask, if it is not the predicted one, and about networks that are left out.
    """
    first = next(iter(analysis.readings.values()))
    classes = get_task(first.task).classes
    head = "".join(f'<th scope="col">{escape(shown_name(label))}</th>' for label in classes)
    rows = ""
    for name, r in analysis.readings.items():
        attention, predicted = escape(titles(name)[1]), escape(shown_name(r.predicted))
        cells = "".join(_cell(r, label, attention) for label in classes)
        rows += f"""<tr style="--shown:url({data_url((inputs[name] + 1) / 2)})">
<th scope="row">{attention}<br>predicts<br><b>{predicted}</b></th>{cells}</tr>"""
    note = "The networks have RANDOM weights: a heatmap that looks the same as before explains nothing. " * random
    native, method = "×".join(map(str, first.native)), escape(get_explainer(analysis.explainer).title)
    return f"""<section class="grid">
<p>{note}{escape(told)}
The networks are shown <b>{escape(shown)}</b>. A heatmap ({method}) has {native} cells and a scale of its own; peaks
compare the classes of one network.</p>
<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>
</section>"""


def _cell(r: Reading, label: str, attention: str) -> str:
    top = ' class="top"' if label in r.present else ""
    figures = f"{r.probabilities[label]:.1%}, peak {r.peaks[label]:.2g}, {r.in_lung[label]:.0%} in lung"
    return f"""<td{top}><span class="shown"><img class="heat" src="{data_url(heat_picture(r.heatmaps[label]))}"
alt="Heatmap of {escape(shown_name(label))} by {attention}"></span>{figures}</td>"""


@lru_cache(maxsize=64)
def receptive_fields(net: torch.nn.Module, size: int) -> tuple[int, ...]:
    """Side, in pixels, of what the middle cell of each map of a network with mask attention covers of a mask."""
    device = next(net.parameters()).device
    mask = torch.ones(1, 1, size, size, device=device, requires_grad=True)
    sides = []
    for m in net.attention_maps(mask):
        (gradient,) = torch.autograd.grad(m[0, 0, m.shape[2] // 2, m.shape[3] // 2], mask, retain_graph=True)
        sides.append(int((gradient[0, 0].abs().sum(0) > 0).sum()))
    return tuple(sides)


def pyramid(net: torch.nn.Module, title: str, mask: np.ndarray) -> str:
    """The last mask map of each resolution of a network with mask attention, each with a sentence."""
    with torch.inference_mode():
        device = next(net.parameters()).device
        maps = net.attention_maps(torch.from_numpy(mask.astype(np.float32))[None, None].to(device))
    fields = receptive_fields(net, mask.shape[0])
    last = {m.shape[-1]: (m[0, 0].float().cpu().numpy(), field) for m, field in zip(maps, fields)}
    figures = ""
    for side, (values, field) in last.items():
        zero, weakened = (values == 0).mean(), ((values > 0) & (values < 0.995)).mean()
        large = np.asarray(Image.fromarray(values).resize((_SIDE, _SIDE), Image.Resampling.NEAREST))
        figures += f"""<figure><img src="{data_url(np.clip(large, 0, 1))}" alt="Mask map of {side}×{side} cells">
<figcaption><b>{side}×{side}</b> A cell covers {field}×{field} pixels of the {mask.shape[0]}×{mask.shape[0]}: features
are set to zero in {zero:.0%} of the cells, weakened in {weakened:.0%}, kept in {1 - zero - weakened:.0%}.</figcaption>
</figure>"""
    return f"""<section class="pyramid"><h2>The mask pyramid of {escape(title)}</h2>
<p>Mask attention pools the mask as each layer pools the features, and multiplies the two: white keeps a feature, black
sets it to zero.</p>
<div>{figures}</div></section>"""


def attended(maps: list[torch.Tensor], title: str, picture: np.ndarray) -> str:
    """A network's own attention maps (1, 1, h, w) over what it was shown, (S, S) in [−1, 1]."""
    under, figures = data_url((picture + 1) / 2), ""
    for alpha in maps:
        alpha = alpha[0, 0].float().cpu().numpy()
        heat = resize((alpha - alpha.min()) / max(float(np.ptp(alpha)), 1e-12), _SIDE)
        strongest = alpha.max() * alpha.size
        figures += f"""<figure><span class="shown" style="--shown:url({under})"><img class="heat"
src="{data_url(heat_picture(np.clip(heat, 0, 1)))}" alt="Attention of {alpha.shape[0]}×{alpha.shape[1]} places"></span>
<figcaption><b>{alpha.shape[0]}×{alpha.shape[1]}</b> The strongest place has {strongest:.1f} times the weight that it
would have if all places had the same.</figcaption></figure>"""
    return f"""<section class="pyramid attended"><h2>What {escape(title)} attends to</h2>
<p>These weights, of sum 1, are not a heatmap made afterwards: the network sums its features with them before it
decides, so they are the same for every class. Each has a colour scale of its own.</p><div>{figures}</div></section>"""


def maps_of(networks: Networks, names: list[str], shown: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """The maps that networks compute with: the mask pyramid of the first with mask attention, then attention of all.

    Args:
        networks: of the page.
        names: of the networks.
        shown: {name: what it was shown and its mask; see `shown_input`}.
    """
    html, nets = "", {name: networks.get().classifiers[name] for name in names}
    masked = next((name for name in names if titles(name)[2] in MASKED), None)
    if masked is not None:
        html += pyramid(nets[masked], titles(masked)[0], shown[masked][1])
    for name, net in nets.items():
        picture, mask = (torch.from_numpy(x.astype(np.float32))[None, None].to(networks.get().device)
                         for x in shown[name])  # fmt: skip
        with torch.inference_mode():
            maps = net.local_attention(picture, mask) if hasattr(net, "local_attention") else []
        if maps:
            html += attended(maps, ", ".join(titles(name)[:2]), shown[name][0])
    return html


def teach_tab(networks: Networks, newest: Newest, found: gr.State, tab: gr.Tab) -> None:
    """Fill the `tab` that is being built.

    Args:
        networks: what reads the X-rays.
        newest: runs what this tab asks for.
        found: holds the `Film` that the page shows, or None.
        tab: to fill.
    """

    def redraw(
        film: Film | None, edited, group, what, name, random, request: gr.Request
    ) -> Iterator[dict]:  # the rest are values of the components below
        newest.forget(request.session_hash)
        if film is None:
            yield {shown: _NOTHING_YET, work: gr.update(visible=False), maps: "", progress: ""}
            return
        pipeline = networks.get()
        compared = groups({model: pipeline.entries[model]["task"] for model in pipeline.models})
        if not compared:
            yield {shown: alert("Nothing to compare", ["There are weights for no classifier."])}
            return
        group = group if group in compared else next(iter(compared))
        models = networks.suited(name, compared[group])
        offered = inputs({networks.view(model).sees for model in compared[group]})
        texts = {key: text for text, key in offered}
        what = what if what in texts else AS_MADE
        explainer = get_explainer(name)
        yield {
            work: gr.update(visible=True),
            which: gr.update(choices=list(compared), value=group),
            seen: gr.update(choices=offered, value=what),
            progress: stage(f"Running {len(models)} networks, with heatmaps by {explainer.title} …"),
        }
        if not models:
            title = f"No heatmaps by {explainer.title}"
            sentence = "It suits none of these networks; choose another method."
            yield {progress: alert(title, [sentence]), shown: "", maps: ""}
            return
        edited = edited if edited is not None and edited[0] == _key(film) else None
        lungs = film.analysis.segmentation
        mask = lungs.at(_SIDE)
        if edited is not None:
            mask = edited[1]
            lungs = Lungs(mask.astype(np.float32), mask)

        def compare(tell: Callable[[float, int], None]) -> Analysis:
            sees = None if what == AS_MADE else what
            return networks.again(film, models, tell, random, lungs=lungs, sees=sees, explainer=name)

        def step(done: float, count: int) -> dict:
            at = f"network {min(int(done) + 1, count)} of {count}, {done / count:.0%} …"
            return {progress: stage(f"Computing heatmaps by {explainer.title}: {at}")}

        try:
            what_if = yield from newest.run(request.session_hash, compare, step)
        except Superseded:
            return
        except Exception:
            logging.exception("The comparison failed.")
            sentence = "The networks could not be compared, and the server’s log says why."
            yield {progress: alert("No comparison", [sentence])}
            return
        given = {
            model: shown_input(networks.input_of(film, model), lungs, networks.view(model), what) for model in models
        }
        pictures = {model: picture for model, (picture, _) in given.items()}
        told = "The lung mask was drawn by hand. " if edited is not None else ""
        if left := [titles(model)[1] for model in compared[group] if model not in models]:
            told += f"{explainer.title} cannot explain {', '.join(left)}. "
        yield {
            shown: withheld(film.analysis.withheld) + grid(what_if, pictures, texts[what], random, told),
            maps: maps_of(networks, models, given),
            canvas: editor(film.analysis, mask),
            progress: "",
        }

    def keep(film: Film | None, event: gr.EventData) -> tuple | None:
        mask = drawn_mask(event.mask)
        return None if film is None or mask is None else (_key(film), mask)

    with gr.Column(visible=False) as work:
        with gr.Row(equal_height=True):
            which = gr.Radio([], label="Backbone", min_width=280)
            seen = gr.Radio(inputs({"lungs"}), value=AS_MADE, label="What the networks are shown", scale=4)
            method = gr.Dropdown(
                explainer_choices(), value=DEFAULT, label="Method", min_width=150, elem_id="compare-explainer"
            )
            random = gr.Checkbox(label="Random weights", min_width=140)
        with gr.Accordion("Draw another mask: what would the networks predict?", open=False, elem_id="what-if"):
            canvas = gr.HTML(apply_default_css=False, js_on_load=_DRAW, elem_id="canvas")
            again = gr.Button("The predicted mask again", size="sm")
    progress = gr.HTML(apply_default_css=False, elem_id="comparing", elem_classes="told")
    shown = gr.HTML(_NOTHING_YET, apply_default_css=False, elem_id="grid")
    maps = gr.HTML(apply_default_css=False, elem_id="pyramid")
    edited = gr.State(time_to_live=1800)  # (which X-ray, mask)
    quick = {"show_progress": "hidden", "api_visibility": "private"}
    event = quick | COMPARISONS | {"trigger_mode": "multiple"}
    fields = [found, edited, which, seen, method, random], [work, which, seen, progress, shown, maps, canvas]
    changes = [tab.select, *(control.input for control in (which, seen, method, random))]
    gr.on(changes, redraw, *fields, **event)
    canvas.submit(keep, found, edited, trigger_mode="always_last", **quick).then(redraw, *fields, **event)
    again.click(lambda: None, None, edited, **quick).then(redraw, *fields, **event)


def _key(film: Film) -> int:
    """Tells one X-ray from another."""
    return zlib.crc32(film.analysis.original)
