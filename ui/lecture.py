"""Projector mode: four screens for a lecture hall, each with one idea, computed when it is shown.

Every sentence with a figure is made of what was computed, or of the recorded evidence. What the dialog does with keys
and buttons is in lecture.js.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from manet_core import Analysis, WeightsError
from manet_core.heatmap_means import alike
from manet_core.networks.attention import AttentionMap
from manet_core.preprocess import resize
from manet_core.tasks import get_task

from .lessons import LESSONS, lesson
from .models import recorded
from .networks import COMPARISONS, Film, Networks, results_of
from .newest import Newest, Superseded
from .render import MASKED, SHORT, alert, data_url, fit, heat_picture, shown_name, stage, titles
from .startup import gr
from .teach import AS_MADE, groups, shown_input
from .viewer import COURIER

SAME_BLOB = 0.8  # correlation from which two heatmaps are called the same blob
VIEWER = "The film in the viewer"
_DEFAULT = "One shadow"
_STAGES = 4  # of a network, that are shown: the last ones
_SIDE, _COMPARED = 320, 64  # pixels of pictures, and of heatmaps that are compared
Tell = Callable[[float, int], None]


@dataclass(frozen=True)
class Show:
    """What a screen is computed from.

    Attributes:
        networks: of the page.
        models: {attention, "" for plain: name of the network}, all of one backbone and one task with one answer.
        film: the X-ray or phantom.
        phantoms: gives the `Film` of a lesson.
        tell: is told how far the computing is.
    """

    networks: Networks
    models: dict[str, str]
    film: Film
    phantoms: Callable[[str], Film]
    tell: Tell

    def readings(self, films: list[Film], **options) -> list[Analysis]:
        """What all networks say of each of the films."""
        count, found = len(self.models), []
        for done, film in enumerate(films):

            def tell(share: float, _: int, done: int = done) -> None:
                self.tell(done * count + share, len(films) * count)

            found.append(self.networks.again(film, list(self.models.values()), tell, **options))
        return found


class Watched(AttentionMap):
    """A mask's map that keeps the features beside it, and multiplies them where the network has mask attention.

    Args:
        mask: (1, 1, S, S) float in [0, 1].
        attention: the network's.

    Attributes:
        seen: {side: (map, activation)}, the last of each side, (side, side) float32; the activation is the mean over
            channels of what is positive.
    """

    def __init__(self, mask: torch.Tensor, attention: str):
        super().__init__(mask, attention == "nma")
        self._multiplies, self.seen = attention in MASKED, {}

    def pool(self, layer: torch.nn.Module) -> "Watched":
        behind = super().pool(layer)
        behind._multiplies, behind.seen = self._multiplies, self.seen
        return behind

    def attend(self, features: torch.Tensor) -> torch.Tensor:
        features = super().attend(features) if self._multiplies else features
        activation = features.clamp(min=0).mean((0, 1))
        self.seen[features.shape[-1]] = tuple(x.float().cpu().numpy() for x in (self.values[0, 0], activation))
        return features


def watched(net: torch.nn.Module, attention: str, image: np.ndarray, mask: np.ndarray) -> dict:
    """`Watched.seen` of a network that is shown an image (S, S) in [−1, 1] with a mask (S, S) bool."""
    device = next(net.parameters()).device
    given = [torch.from_numpy(x.astype(np.float32))[None, None].to(device) for x in (image, mask)]
    with torch.inference_mode():
        behind = Watched(given[1], attention)
        net.walk(given[0], behind)
    return behind.seen


def mask_screen(show: Show) -> str:
    """The mask on its way through a network, and features without and with it."""
    net, masked = show.networks.get().classifiers, [key for key in MASKED if key in show.models]
    seen = {}
    for done, key in enumerate(("", *masked)):
        name = show.models[key]
        picture = show.networks.input_of(show.film, name)
        given = shown_input(picture, show.film.analysis.segmentation, show.networks.view(name), AS_MADE)
        seen[key], mask = watched(net[name], key, *given), given[1].astype(np.float32)
        show.tell(done + 1, 1 + len(masked))
    sides = sorted(seen[""], reverse=True)[-_STAGES:]
    columns = [(f"{SHORT[key]}:<br>mask map", key, 0) for key in masked]
    columns += [(f"{SHORT[key]}:<br>features", key, 1) for key in seen]
    rows = []
    for side in sides:
        maps = [seen[key][side][part] for _, key, part in columns]
        top = max(float(m.max()) for m, (_, _, part) in zip(maps, columns) if part)  # one scale for all features
        cells = [_pixels(m / max(top, 1e-9) if part else m) for m, (_, _, part) in zip(maps, columns)]
        rows.append((f"{side}×{side}", cells))
    first, last = sides[0], sides[-1]
    said = ["A cell of a mask map is the share of lung in all that the feature beside it looks at."]
    for key in masked:
        spans = [f"{seen[key][side][0].min():.0%} to {seen[key][side][0].max():.0%}" for side in (first, last)]
        kept, zero = ((seen[key][first][0] > 0.995).mean(), (seen[key][first][0] == 0).mean())
        said.append(
            f"<b>{SHORT[key]}</b> keeps {spans[0]} of a feature at {first}×{first} (all of it in {kept:.0%} of the "
            f"cells, none in {zero:.0%}), and {spans[1]} at {last}×{last}."
        )
    shares = []
    for key in seen:
        outside = [_share(seen[key][side][1], resize(mask, side) < 0.5) for side in (first, last)]
        shares.append(f"{SHORT[key]} {outside[0]:.0%}, {outside[1]:.0%}")
    said.append(f"Features outside the lungs, at {first}×{first} and at {last}×{last}: {'; '.join(shares)}.")
    caption = "White: kept, or strong; black: set to zero. Features of one row have one scale."
    return _screen(_table([head for head, _, _ in columns], rows, caption), said)


def cam_screen(show: Show) -> str:
    """Heatmaps of one class on three phantoms that differ in their shadow alone."""
    names = ("One shadow", "The shadow elsewhere", "Nothing to find")
    labels = ("shadow", "shadow moved", "no shadow")
    films = [show.phantoms(name) for name in names]
    found = show.readings(films)
    classes = {name: found[0].readings[name].predicted for name in show.models.values()}
    maps = [{n: analysis.heatmap(n, c, (_COMPARED, _COMPARED)) for n, c in classes.items()} for analysis in found]
    rows = []
    for label, film, analysis in zip(labels, films, found):
        cells = [f'<img src="{_picture(film)}" alt="The phantom: {label}">']
        for name, class_ in classes.items():
            chance = analysis.readings[name].probabilities[class_]
            cells.append(_heated(film, analysis, name, class_) + f"{chance:.0%}")
        rows.append((label, cells))
    head = ["phantom", *(f"{SHORT[key]}:<br>{_short(classes[name])}" for key, name in show.models.items())]
    said, stayed = [], []
    for label, after in zip(("The shadow was moved to the other lung", "The shadow was taken away"), maps[1:]):
        r = {key: alike(maps[0][name], after[name]) for key, name in show.models.items()}
        same = [key for key, value in r.items() if value is not None and value >= SAME_BLOB]
        stayed.append(same)
        told = ", ".join(f"{SHORT[key]} {'empty' if value is None else _signed(value)}" for key, value in r.items())
        said.append(
            f"{label}: in <b>{len(same)} of {len(r)}</b> networks the heatmap is the same blob as before, with a "
            f"correlation of at least {SAME_BLOB} ({told})."
        )
    change = lesson(names[0], _COMPARED).pixels - lesson(names[2], _COMPARED).pixels
    place = change > change.max() / 4
    shares = "; ".join(
        f"{SHORT[key]} {_share(maps[0][name], place):.0%}, {_share(maps[2][name], place):.0%}"
        for key, name in show.models.items()
    )
    said.append(f"Heat in the shadow’s place, {place.mean():.0%} of the film, with the shadow and without: {shares}.")
    said.append(what_cam_says(stayed, len(show.models)))
    caption = "Heatmaps are of the class that each network names on the first phantom; below is its probability."
    return _screen(_table(head, rows, caption), said)


def what_cam_says(stayed: list[list[str]], count: int) -> str:
    """A sentence of which heatmaps stayed the same, when the shadow was moved and when it was taken away."""
    moved, removed = map(len, stayed)
    if removed:
        return "A heatmap that is the same without the shadow does not show that the shadow was the reason."
    if moved:
        return "A heatmap that stays where it was does not show where the shadow is."
    return f"All {count} heatmaps changed with the shadow. That they depend on it does not say that the class is right."


def _share(values: np.ndarray, place: np.ndarray) -> float:
    """How much of values (h, w) lies in a place (h, w) bool."""
    return float(values[place].sum() / max(float(values.sum()), 1e-9))


def accuracy_screen(show: Show) -> str:
    """The same film with the lungs and without them, beside what was recorded of networks without lungs."""
    film, names = show.film, list(show.models.values())
    (shown,) = show.readings([film])
    (blind,) = show.readings([film], sees="outside")
    rows, same = [], []
    for key, name in show.models.items():
        before, after = shown.readings[name], blind.readings[name]
        same += [SHORT[key]] * (before.predicted == after.predicted)
        cells = [f"{_short(r.predicted)}<br>{r.probabilities[r.predicted]:.0%}" for r in (before, after)]
        rows.append((SHORT[key], cells))
    pictures = []
    for what, alt in ((AS_MADE, "What the networks were made for"), ("outside", "The lungs blacked out")):
        picture, _ = shown_input(
            show.networks.input_of(film, names[0]), film.analysis.segmentation, show.networks.view(names[0]), what
        )
        pictures.append(f'<img src="{data_url((picture + 1) / 2)}" alt="{alt}">')
    caption = "What each network names, and its probability."
    table = _table(["with the lungs", "lungs blacked out"], [("", pictures), *rows], caption, 2)
    listed = f" ({', '.join(same)})" if same else ""
    said = [
        f"Without the lungs, <b>{len(same)} of {len(rows)}</b> networks name the same class as with them{listed}.",
        *without_lungs(*results_of(show.networks.weights)),
    ]
    return _screen(table, said)


def without_lungs(*results: Path) -> list[str]:
    """Sentences of HTML: the recorded accuracy of a network that is shown all but the lungs, against its like."""
    measured = (recorded(folder / "evidence.json")["controls"] for folder in results)
    controls = next(filter(None, measured), {})
    try:
        blind, shown, n = (controls["outside"], controls["lungs"], controls["outside"]["n"])
        accuracy, other = (_percent(c["accuracy"]) for c in (blind, shown))
        gain, elsewhere = (blind["minus_lungs"][figure] for figure in ("accuracy", "external_groups"))
        compared = _compared(gain), _compared(elsewhere)
    except (KeyError, TypeError):
        return ["For these weights, nothing was recorded of networks that are shown no lungs."]
    conclusion = (
        "So such an accuracy does not show that a network reads lungs."
        if gain["high"] >= 0
        else "So some of the accuracy needs the lungs, and the rest does not."
    )
    return [
        f"Recorded, on {n} test films: trained and shown <b>all but the lungs</b>, a network is right in {accuracy}; "
        f"shown the lungs, in {other}.",
        f"That is {compared[0]}. {conclusion}",
        f"On films of other hospitals it is {compared[1]}, as a mean over classes and sources.",
    ]


def _percent(figure: dict) -> str:
    return f"{100 * figure['value']:.1f}% ({100 * figure['low']:.1f}–{100 * figure['high']:.1f})"


def _compared(difference: dict) -> str:
    """A difference in words, of shares between −1 and 1."""
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    points = f"{abs(value):.1f} points"
    if low > 0 or high < 0:
        low, high = sorted((abs(low), abs(high)))
        return f"{points} <b>{'better' if value > 0 else 'worse'}</b> (95% interval {low:.1f}–{high:.1f})"
    said = f"{'better' if value > 0 else 'worse'} (95% interval {low:.1f} to {high:.1f})"
    return f"{points} {said}, which may be chance"


def attention_screen(show: Show) -> str:
    """The heatmaps of one class by every attention."""
    (found,) = show.readings([show.film])
    task = next(iter(found.readings.values())).task
    class_ = found.leading_of(task)[0]
    cells, heads, maps, shares = [], [], {}, []
    for key, name in show.models.items():
        r = found.readings[name]
        heads.append(SHORT[key])
        cells.append(
            f"{_heated(show.film, found, name, class_)}names {_short(r.predicted)} {r.probabilities[r.predicted]:.0%}"
        )
        maps[key] = found.heatmap(name, class_, (_COMPARED, _COMPARED))
        shares.append(f"{SHORT[key]} {r.in_lung[class_]:.0%}")
    votes = found.votes_of(task)
    told = ", ".join(f"{escape(shown_name(name))} by {n}" for name, n in votes.items())
    said = [
        f"{'They agree' if len(votes) == 1 else 'They disagree'}: {told}.",
        f"Share of the heatmap of {escape(shown_name(class_))} inside the lungs: {', '.join(shares)}.",
    ]
    plain = found.readings[show.models[""]].in_lung[class_]
    masked = found.readings[show.models["ma"]].in_lung[class_]
    if masked > plain:
        said.append("That of MA is higher than that of plain, partly by construction: it dims what lies outside.")
    else:
        said.append("MA dims what lies outside the lungs, and yet its share is not higher than that of plain.")
    pairs = {pair: alike(maps[pair[0]], maps[pair[1]]) for pair in combinations(maps, 2)}
    pairs = {pair: r for pair, r in pairs.items() if r is not None}
    if len(pairs) > 1:
        (most, least) = (choose(pairs, key=pairs.get) for choose in (max, min))
        said.append(
            f"Most alike are the heatmaps of {SHORT[most[0]]} and {SHORT[most[1]]} (correlation "
            f"{_signed(pairs[most])}), least alike those of {SHORT[least[0]]} and {SHORT[least[1]]} "
            f"({_signed(pairs[least])})."
        )
    caption = f"Heatmaps (Grad-CAM) of {escape(shown_name(class_))}, each on its own scale."
    return _screen(_table(heads, [("", cells)], caption), said, "wide")


SCREENS: dict[str, Callable[[Show], str]] = {
    "What a mask does to a network": mask_screen,
    "What Grad-CAM can and cannot say": cam_screen,
    "Why accuracy lies": accuracy_screen,
    "One film, several attentions": attention_screen,
}
_OF_PHANTOMS = (cam_screen,)  # these need films in which one thing is changed


def compared_networks(networks: Networks) -> dict[str, str]:
    """{attention: network} of the first backbone whose networks have one answer, and that is there without attention.

    The one with most attentions, of several; {} where there is none.
    """
    entries = networks.get().entries
    tasks = {name: entries[name]["task"] for name in networks.get().models}
    found = groups({name: task for name, task in tasks.items() if get_task(task).exclusive})
    families = [{titles(name)[2]: name for name in names} for names in found.values()]
    families = [family for family in families if "" in family and "ma" in family]
    best = max(families, key=len, default={})
    return {key: best[key] for key in SHORT if key in best and key != "e2e"}


class Lecture:
    """Draws the button that starts projector mode, and its dialog, into the page that is being built.

    Args:
        networks: what reads the films.
        newest: runs what a page asks for here.
        found: holds the `Film` that the page shows, or None.
    """

    def __init__(self, networks: Networks, newest: Newest, found: gr.State):
        self.networks, self.newest, self._phantoms = networks, newest, {}
        dialog = gr.HTML(_shell(), apply_default_css=False, js_on_load=_SCRIPT, elem_id="lecture")
        told = gr.HTML("", html_template="", js_on_load=COURIER.format("screen"), elem_classes="courier")
        event = {"trigger_mode": "multiple", "show_progress": "hidden", "api_visibility": "private"}
        dialog.submit(self._show, found, told, **event, **COMPARISONS)

    def phantom(self, name: str) -> Film:
        """The film of a lesson, kept: it is the same for everybody."""
        if name not in self._phantoms:
            x = lesson(name)
            self._phantoms[name] = self.networks.keep(x, self.networks.analyze(x, models=[]), name)
        return self._phantoms[name]

    def _show(self, film: Film | None, event: gr.EventData, request: gr.Request) -> Iterator[str]:
        """A screen, and before it how far it is; JSON with the number by which the page asked."""
        number, chosen, asked = event.screen, str(event.film), event.asked
        if number not in range(len(SCREENS)):
            return
        title, draw = list(SCREENS.items())[number]

        def answer(html: str, done: bool = False) -> str:
            return json.dumps({"asked": asked, "screen": number, "title": title, "html": html, "done": done})

        def work(tell: Tell) -> str:
            models, start = compared_networks(self.networks), time.monotonic()
            if not models:
                return alert("Nothing to show", ["This needs a network of one backbone without attention and with MA."])
            own = film is not None and chosen == VIEWER and draw not in _OF_PHANTOMS
            name = chosen if chosen in LESSONS else _DEFAULT
            shown = film if own else self.phantom(name)
            html = draw(Show(self.networks, models, shown, self.phantom, tell))
            return html + _about(own, name, draw, shown, titles(models[""])[0], time.monotonic() - start)

        def step(done: float, count: int) -> str:
            return answer(stage(f"Computing: {done / count:.0%} …"))

        yield answer(stage("Computing …"))
        try:
            yield answer((yield from self.newest.run(request.session_hash, work, step)), True)
        except Superseded:
            return
        except WeightsError as error:
            yield answer(alert("Nothing to show", [str(error)]))
        except Exception:
            logging.exception("A screen of the lecture failed.")
            yield answer(alert("Nothing to show", ["The screen could not be computed, and the server’s log says why."]))


def _about(own: bool, name: str, draw: Callable, film: Film, backbone: str, seconds: float) -> str:
    """What a screen was computed on, and how far that can be believed."""
    doubt = ""
    if own:
        what = "the film in the viewer."
        if film.analysis.withheld:
            doubt = f'<p class="doubt">No reliable reading: {escape(" ".join(film.analysis.withheld))}</p>'
    else:
        drawn = "synthetic phantoms" if draw in _OF_PHANTOMS else f"the synthetic phantom “{name}”"
        what = f"{drawn}, no person. How often networks are right, a drawing cannot show."
    about = f"Computed now, in {seconds:.1f} s, by {escape(backbone)} on {escape(what)}"
    return f'{doubt}<p class="about">{about}</p>'


def _screen(exhibit: str, said: list[str], layout: str = "") -> str:
    sentences = "".join(f"<p>{sentence}</p>" for sentence in said)
    return f'<div class="shows {layout}">{exhibit}<div class="says" aria-live="polite">{sentences}</div></div>'


def _table(head: list[str], rows: list[tuple[str, list[str]]], caption: str, large: int | None = None) -> str:
    """Rows of a title and its cells; the pictures in it are as large as if there were `large` rows."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        "<tr>" + (f'<th scope="row">{title}</th>' if title else "<td></td>")
        + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for title, cells in rows
    )  # fmt: skip
    return (
        f'<table style="--rows:{large or len(rows)};--columns:{len(head)}"><caption>{caption}</caption>'
        f"<thead><tr><td></td>{top}</tr></thead><tbody>{body}</tbody></table>"
    )


def _pixels(values: np.ndarray) -> str:
    """A map in [0, 1] with its cells to be seen."""
    return f'<img class="cells" src="{data_url(np.clip(values, 0, 1))}" alt="">'


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _picture(film: Film) -> str:
    return data_url(resize(film.analysis.original, fit(film.analysis.original.shape, _SIDE)))


def _heated(film: Film, found: Analysis, name: str, class_: str) -> str:
    """A film under a heatmap."""
    shape = fit(film.analysis.original.shape, _SIDE)
    heat = data_url(heat_picture(np.clip(found.heatmap(name, class_, shape), 0, 1)))
    attention, label = escape(titles(name)[1]), escape(shown_name(class_))
    return (
        f'<span class="under"><img src="{_picture(film)}" alt=""><img class="heat" src="{heat}" '
        f'alt="Heatmap of {label} by {attention}"></span>'
    )


def _short(name: str) -> str:
    return escape(shown_name(name))


def _shell() -> str:
    options = "".join(f"<option>{escape(name)}</option>" for name in (VIEWER, *LESSONS))
    listed = escape(json.dumps(list(SCREENS)))
    return f"""
<div class="begin"><button class="start">Start projector mode</button>
<p>Four screens in large type: {"; ".join(map(escape, SCREENS))}. Arrow keys go on and back,
Escape leaves.</p></div>
<dialog class="lecture" aria-labelledby="lecture-title" data-titles="{listed}" data-viewer="{escape(VIEWER)}"
data-default="{escape(_DEFAULT)}"><h2 id="lecture-title"></h2><div class="screen"></div>
<div class="leads"><button data-by="-1">← Back</button><span class="at"></span><button data-by="1">Next →</button>
<label>On <select>{options}</select></label><button class="leave">Leave (Esc)</button></div></dialog>
"""


_SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
