"""The tab for one X-ray: the pictures, the readings, the heatmaps by any explainer, the report; and the quiz."""

import base64
import io
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

from manet_core import WeightsError, XRay, XRayError
from manet_core.explain import DEFAULT, get_explainer, list_explainers
from manet_core.phantom import phantom
from manet_core.report import save_report

from . import render
from .networks import ANALYSES, EXPLANATIONS, Film, Networks
from .startup import gr
from .uploads import Uploads

PHANTOMS = {"Clear lungs": (0, 0.0), "Faint shadow": (1, 0.5), "Dense shadow": (2, 1.0)}  # name: (seed, opacity)
KEEP_S = 1800  # seconds for which a result waits for another class to be chosen, or for a report
LONGEST_NOTE = 600  # characters
_WINDOW = """
(centre, width, inverted) => {
  const slope = (inverted ? -1 : 1) / width;
  for (const channel of document.querySelectorAll('#window feComponentTransfer > *')) {
    channel.setAttribute('slope', slope);
    channel.setAttribute('intercept', 0.5 - slope * centre);
  }
}
"""
_FULL_SCREEN = """
element.addEventListener('click', event => {
  const picture = event.target.closest('.zoom');
  if (picture) document.fullscreenElement ? document.exitFullscreen() : picture.requestFullscreen();
});
"""
_PRIVATE = {"api_visibility": "private"}


class _Superseded(Exception):
    """Other heatmaps, or another X-ray, were asked for meanwhile."""


class OpinionTab:
    """Draws the tab into the page that is being built, and answers it.

    Args:
        networks: what reads the X-rays.
        uploads: what reads their files.
        found: the state that holds the `Film` that is shown.

    Attributes:
        status: the line that says what is being done, or what went wrong.
    """

    def __init__(self, networks: Networks, uploads: Uploads, found: gr.State):
        self.networks, self.uploads, self.found = networks, uploads, found
        self._explaining: dict[str, object] = {}  # session: a token of its newest request for other heatmaps
        self._draw()
        self._connect()

    def _draw(self) -> None:
        self.score = gr.State((0, 0))  # of “read first”: agreements with the networks, X-rays read
        with gr.Row(equal_height=True):
            self.drop = gr.File(label="X-ray", show_label=False, height=76, scale=3, elem_id="drop")
            with gr.Column(scale=2, elem_classes="phantoms"):
                _html("<p>No X-ray at hand? Try a drawing: <b>synthetic phantom, not a person.</b></p>")
                with gr.Row(equal_height=True):
                    self.phantoms = {name: gr.Button(name, size="sm", min_width=90) for name in PHANTOMS}
                self.quiz = gr.Checkbox(label="Read first, then see the networks’ predictions", container=False)
        self.status = _html(elem_id="status")
        with gr.Row(visible=False, equal_height=True) as self.quiz_panel:
            self.guess = gr.Radio([], label="What do you see? Then the networks’ predictions appear.")
        self.verdict = _html(elem_id="verdict")
        with gr.Column(visible=False) as self.headline:
            self.summary = _html(elem_id="summary")
        self.pictures = _html(render.EMPTY, elem_id="pictures", js_on_load=_FULL_SCREEN)
        with gr.Column(visible=False) as self.result:
            self.limits = _html()
            self._draw_controls()
            self.progress = _html(elem_id="explaining")
            self.cards = _html(elem_id="cards", js_on_load=_FULL_SCREEN)
            self.notes = _html(elem_id="notes")
            with gr.Accordion("Report on one page", open=False, elem_id="report"):
                self.note = gr.Textbox(
                    label="Note, printed on the report and kept nowhere", lines=2, max_length=LONGEST_NOTE
                )
                with gr.Row():
                    self.save = {kind: gr.Button(f"Save as {kind.upper()}", size="sm") for kind in ("pdf", "png")}
                self.saved = _html(elem_id="saved")

    def _draw_controls(self) -> None:
        with gr.Row(equal_height=True):
            self.explain = gr.Radio(
                render.choices([]), value=render.PREDICTED, label="Heatmaps of", scale=6, elem_id="explain"
            )
            self.explainer = gr.Dropdown(
                [(_title(name), name) for name in list_explainers()],
                value=DEFAULT, label="Method", min_width=150, scale=2, elem_id="explainer",
            )  # fmt: skip
            self.opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity", min_width=170, scale=2, buttons=[])
        with gr.Accordion("Window, colours, scale", open=False, elem_id="view"):
            with gr.Row(equal_height=True):
                self.centre = gr.Slider(0, 1, 0.5, step=0.01, label="Window centre", buttons=[])
                self.width = gr.Slider(0.05, 2, 1, step=0.01, label="Window width", buttons=[])
                self.inverted = gr.Checkbox(label="Invert the X-ray", min_width=120)
                self.outlined = gr.Checkbox(label="Show the mask’s outline", min_width=120)
                self.on_lungs = gr.Checkbox(label="Heatmaps over the lungs alone", min_width=120)
            with gr.Row(equal_height=True):
                self.colours = gr.Radio(render.COLOUR_MAPS, value=render.COLOUR_MAP, label="Colours of heatmaps")
                self.scale = gr.Radio(render.SCALES, value=render.OWN, label="Scale of heatmaps")

    def _connect(self) -> None:
        view = [self.explain, self.colours, self.scale]  # the fields of render.View
        gr.on(  # at once, in the browser: other people's X-rays may be ahead in the queue
            [self.drop.upload, *(button.click for button in self.phantoms.values())],
            None, None, self.status, js=f"() => {json.dumps(render.stage('Waiting for its turn …'))}",
            trigger_mode="multiple", **_PRIVATE,
        )  # fmt: skip
        shown = [
            self.drop, self.status, self.verdict, self.headline, self.summary, self.pictures, self.result, self.limits,
            self.explain, self.explainer, self.progress, self.cards, self.notes, self.found, self.saved,
            self.quiz_panel, self.guess,
        ]  # fmt: skip
        event = {"outputs": shown, "show_progress": "hidden"} | _PRIVATE | ANALYSES
        options = [self.quiz, self.explainer, *view]
        self.drop.upload(self._answer_upload, [self.drop, *options], preprocess=False, trigger_mode="multiple", **event)
        for name, button in self.phantoms.items():
            button.click(self._answer_phantom(name), options, **event)
        self.guess.input(
            self._reveal, [self.found, self.guess, self.score],
            [self.headline, self.result, self.quiz_panel, self.verdict, self.score],
            queue=False, show_progress="hidden", **_PRIVATE,
        )  # fmt: skip
        gr.on(
            [control.input for control in view], self._redraw, [self.found, *view], self.cards, queue=False,
            show_progress="hidden", trigger_mode="always_last", **_PRIVATE,
        )  # fmt: skip
        self.explainer.input(
            self._explain, [self.found, self.explainer, *view],
            [self.found, self.progress, self.explainer, self.cards, self.notes],
            show_progress="hidden", trigger_mode="multiple", **_PRIVATE, **EXPLANATIONS,
        )  # fmt: skip
        for kind, button in self.save.items():
            made = button.click(self._report(kind), [self.found, self.note], self.saved, queue=False, **_PRIVATE)
            made.then(None, js="() => document.querySelector('#saved a')?.click()", **_PRIVATE)
        self._connect_browser()

    def _connect_browser(self) -> None:
        """What needs no server: opacity, window, outline."""
        only = {"fn": None} | _PRIVATE
        window = [self.centre, self.width, self.inverted]
        self.opacity.input(inputs=self.opacity, js=_sets("--heat"), **only)
        gr.on([control.input for control in window], inputs=window, js=_WINDOW, **only)
        self.outlined.input(inputs=self.outlined, js=_sets("--outline", "value ? 'block' : 'none'"), **only)
        under = "value ? 'var(--lungs)' : 'var(--whole)'"
        self.on_lungs.input(inputs=self.on_lungs, js=_sets("--under", under), **only)

    def check_weights(self) -> str:
        """For the status line of a page that was just opened: a sentence where weights are missing."""
        try:
            self.networks.get()
        except WeightsError as error:
            return render.alert("No analysis is possible", [str(error)])
        return gr.skip()

    def forget(self, session: str) -> None:
        """End what a page that was closed had asked for."""
        self._explaining.pop(session, None)

    def _answer_upload(
        self, file: dict, quiz: bool, explainer: str, explain: str, colours: str, scale: str, request: gr.Request
    ) -> Iterator[dict]:
        self.forget(request.session_hash)
        yield from self._answer(lambda: self.uploads.read(file), quiz, explainer, render.View(explain, colours, scale))

    def _answer_phantom(self, name: str) -> Callable:
        seed, opacity = PHANTOMS[name]

        def answer(
            quiz: bool, explainer: str, explain: str, colours: str, scale: str, request: gr.Request
        ) -> Iterator[dict]:
            self.forget(request.session_hash)
            view = render.View(explain, colours, scale)
            yield from self._answer(lambda: phantom(seed=seed, opacity=opacity), quiz, explainer, view)

        return answer

    def _answer(self, read: Callable[[], XRay], quiz: bool, explainer: str, view: render.View) -> Iterator[dict]:
        """What the page shows, stage by stage, of the X-ray that `read` returns."""
        yield {
            self.status: render.stage("Reading the picture …"),
            self.pictures: "",
            self.headline: gr.update(visible=False),
            self.result: gr.update(visible=False),
            self.quiz_panel: gr.update(visible=False),
            self.verdict: "",
            self.progress: "",
            self.found: None,
            self.saved: "",
        }
        try:
            x = read()
            yield {self.status: render.stage("Loading the models …"), self.drop: None}
            count = len(self.networks.get().models)
            yield {self.status: render.stage(f"Segmenting the lungs and running {count} networks …")}
            analysis = self.networks.analyze(x, explainer=self._at_once(explainer))
            film = self.networks.keep(x, analysis)
        except (XRayError, WeightsError) as error:
            yield self._refusal(str(error))
            return
        except Exception:
            logging.exception("The analysis failed.")
            yield self._refusal("The analysis failed, and the server’s log says why; try another picture.")
            return
        yield self._shown(film, quiz, view) | {self.pictures: render.pictures(analysis)}

    def _at_once(self, name: str) -> str:
        """This explainer, if it suits all networks and is fast: minutes are spent only when asked for."""
        explainer = get_explainer(name)
        suits = all(map(explainer.suits, self.networks.get().classifiers.values()))
        return name if suits and not explainer.slow else DEFAULT

    def _refusal(self, sentence: str) -> dict:
        return {
            self.status: render.alert("Not analysed", [sentence]),
            self.pictures: render.EMPTY,
            self.drop: None,
        }

    def _shown(self, film: Film, quiz: bool, view: render.View) -> dict:
        analysis = film.analysis
        choices, task = render.choices(analysis.tasks), render.reading_task(analysis)
        if view.explain not in dict(choices).values():
            view = replace(view, explain=render.PREDICTED)
        quiz = quiz and task is not None
        return {
            self.status: render.alert("Warning", analysis.warnings),
            self.headline: gr.update(visible=not quiz),
            self.result: gr.update(visible=not quiz),
            self.quiz_panel: gr.update(visible=quiz),
            self.guess: gr.update(choices=render.choices([task.name])[1:] if task else [], value=None),
            self.summary: render.summary(analysis),
            self.limits: render.limits(analysis),
            self.explain: gr.update(choices=choices, value=view.explain),
            self.explainer: analysis.explainer,
            self.cards: render.cards(analysis, view),
            self.notes: render.notes(analysis),
            self.found: film,
        }

    def _explain(
        self, film: Film | None, name: str, explain: str, colours: str, scale: str, request: gr.Request
    ) -> Iterator[dict]:
        """The heatmaps of the X-ray that is shown, by another explainer."""
        if film is None:
            yield {self.progress: render.alert("The result has expired", ["Drop the X-ray again."])}
            return
        title, told = get_explainer(name).title, SimpleQueue()
        try:
            self.networks.get().check_suits(get_explainer(name), list(film.analysis.readings))
        except ValueError as error:
            self.forget(request.session_hash)
            yield self._unexplained(film, title, str(error))
            return
        mine = self._explaining[request.session_hash] = object()

        def go_on() -> None:
            if self._explaining.get(request.session_hash) is not mine:
                raise _Superseded

        def progress(done: float, count: int) -> None:
            go_on()
            told.put((done, count))

        def explained() -> Film:
            models = list(film.analysis.readings)
            found = replace(film, analysis=self.networks.again(film, models, progress, explainer=name))
            go_on()
            return found

        yield {self.progress: render.stage(f"Computing heatmaps by {title} …")}
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(explained)
            job.add_done_callback(lambda _: told.put(None))
            while step := told.get():
                done, count = step
                text = f"Computing heatmaps by {title}: network {min(int(done) + 1, count)} of {count}"
                yield {self.progress: render.stage(f"{text}, {done / count:.0%} …")}
        try:
            film = job.result()
        except _Superseded:
            return
        except Exception:
            logging.exception("The explanation failed.")
            yield self._unexplained(film, title, "They could not be computed, and the server’s log says why.")
            return
        finally:
            if self._explaining.get(request.session_hash) is mine:
                self.forget(request.session_hash)
        yield {
            self.found: film,
            self.progress: "",
            self.cards: render.cards(film.analysis, render.View(explain, colours, scale)),
            self.notes: render.notes(film.analysis),
        }

    def _unexplained(self, film: Film, title: str, sentence: str) -> dict:
        return {
            self.progress: render.alert(f"No heatmaps by {title}", [sentence]),
            self.explainer: film.analysis.explainer,
        }

    def _reveal(self, film: Film | None, guess: str, score: tuple[int, int]) -> dict:
        if film is None:
            expired = render.alert("The result has expired", ["Drop the X-ray again."])
            return {self.quiz_panel: gr.update(visible=False), self.verdict: expired}
        task = render.reading_task(film.analysis).name
        score = (score[0] + (guess in film.analysis.leading_of(task)), score[1] + 1)
        return {
            self.quiz_panel: gr.update(visible=False),
            self.headline: gr.update(visible=True),
            self.result: gr.update(visible=True),
            self.verdict: render.verdict(guess, film.analysis.votes_of(task), score),
            self.score: score,
        }

    def _redraw(self, film: Film | None, *view: str) -> str:
        if film is None:
            return render.alert("The heatmaps have expired", ["Drop the X-ray again to see other classes."])
        return render.cards(film.analysis, render.View(*view))

    def _report(self, kind: str) -> Callable[[Film | None, str], str]:
        name, media = f"MANet.{kind}", {"pdf": "application/pdf", "png": "image/png"}[kind]

        def report(film: Film | None, note: str) -> str:
            if film is None:
                return render.alert("The result has expired", ["Drop the X-ray again to save a report."])
            page, hashes = io.BytesIO(), self.networks.get().hashes
            save_report(film.analysis, page, note=note[:LONGEST_NOTE], hashes=hashes, format=kind)
            data = base64.b64encode(page.getvalue()).decode()
            return f'<a download="{name}" href="data:{media};base64,{data}">Save {name} again</a>'

        return report


def _html(value: str = "", **options) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


def _title(name: str) -> str:
    explainer = get_explainer(name)
    return explainer.title + (" (slow)" if explainer.slow else "")


def _sets(variable: str, value: str = "value") -> str:
    """JavaScript that sets a CSS variable of the page to an expression of a control's `value`."""
    return f"value => document.querySelector('.gradio-container').style.setProperty('{variable}', {value})"
