"""The tab for one X-ray: the pictures, the readings, the heatmaps by any explainer, the report; and the quiz."""

import base64
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from manet_core import WeightsError, XRay, XRayError
from manet_core.explain import DEFAULT, get_explainer
from manet_core.phantom import phantom
from manet_core.preprocess import resize
from manet_core.report import save_report
from manet_core.tasks import get_task

from . import filing, render
from .networks import ANALYSES, EXPLANATIONS, KEEP_SIDE, Film, Networks
from .newest import Newest, Superseded
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
  const changed = [inverted ? 'inverted' : '', centre == 0.5 && width == 1 ? '' : 'windowed'].filter(Boolean);
  const style = document.querySelector('.gradio-container').style;
  style.setProperty('--window', changed.length ? `"${changed.join(', ')}"` : 'none');
  style.setProperty('--window-badge', changed.length ? 'var(--amber)' : 'transparent');
}
"""
_FULL_SCREEN = """
element.addEventListener('click', event => {
  const picture = event.target.closest('.zoom');
  if (picture) document.fullscreenElement ? document.exitFullscreen() : picture.requestFullscreen();
});
"""
_FAILED = "The analysis failed, and the server’s log says why; try another picture."
_PRIVATE = {"api_visibility": "private"}


class OpinionTab:
    """Draws the tab into the page that is being built, and answers it.

    The name of an X-ray's file is shown, and printed on the report, so that its reader can tell which film a reading
    belongs to. It stays in the memory of this page's session and goes with it: it is in no log, no file and no answer
    to another page. Nothing else of the file is shown that could tell a patient.

    Args:
        networks: what reads the X-rays.
        uploads: what reads their files.
        newest: runs what a page asks for later, other heatmaps or further networks.
        found: the state that holds the `Film` that is shown.

    Attributes:
        status: the line that says what is being done, or what went wrong.
    """

    def __init__(self, networks: Networks, uploads: Uploads, newest: Newest, found: gr.State):
        self.networks, self.uploads, self.newest, self.found = networks, uploads, newest, found
        self._draw()

    def _draw(self) -> None:
        tasks = self.networks.tasks()
        self.score = gr.State((0, 0))  # of “read first”: agreements with the networks, X-rays read
        with gr.Row(equal_height=True, elem_id="top"):
            self.drop = gr.File(label="X-ray", show_label=False, height=76, scale=3, elem_id="drop")
            with gr.Column(scale=2, elem_classes="phantoms"):
                hint = "<span class='hint'>No X-ray at hand? </span>"
                _html(f"<p>{hint}Try a drawing: <b>synthetic phantom, not a person.</b></p>")
                with gr.Row(equal_height=True):
                    self.phantoms = {name: gr.Button(name, size="sm", min_width=90) for name in PHANTOMS}
                self.quiz = gr.Checkbox(label="Read first, then see the networks’ predictions", container=False)
        self.families = gr.CheckboxGroup(
            [(get_task(name).title, name) for name in tasks], value=tasks[:1], label="Networks that answer",
            visible=len(tasks) > 1, elem_id="families",
        )  # fmt: skip
        self.status = _html(elem_id="status", elem_classes="told")
        self.read = _html(elem_id="read", elem_classes="told")
        with gr.Row(visible=False, equal_height=True) as self.quiz_panel:
            self.guess = gr.Radio([], label="What do you see? Then the networks’ predictions appear.", elem_id="quiz")
        self.verdict = _html(elem_id="verdict", elem_classes="told")
        with gr.Column(visible=False) as self.headline:
            self.withheld = _html(elem_id="withheld", elem_classes="told")
            self.anyway = gr.Button("Show the networks’ answers anyway", size="sm", elem_id="anyway")
            with gr.Column() as self.claim:
                self.summary = _html(elem_id="summary")
        self.pictures = _html(render.EMPTY, elem_id="pictures", js_on_load=_FULL_SCREEN)
        with gr.Column(visible=False) as self.result:
            self.limits = _html()
            self._draw_controls()
            self.progress = _html(elem_id="explaining", elem_classes="told")
            self.cards = _html(elem_id="cards", js_on_load=_FULL_SCREEN)
            self.notes = _html(elem_id="notes")
            with gr.Accordion("Report on one page", open=False, elem_id="report"):
                self.note = gr.Textbox(
                    label="Note, printed on the report and kept nowhere", lines=2, max_length=LONGEST_NOTE
                )
                with gr.Row():
                    self.save = {kind: gr.Button(f"Save as {kind.upper()}", size="sm") for kind in ("pdf", "png")}
                    self.dicom = filing.dicom_button()
                self.saved = _html(elem_id="saved")

    def _draw_controls(self) -> None:
        with gr.Row(equal_height=True):
            self.explain = gr.Radio(
                render.choices([]), value=render.PREDICTED, label="Heatmaps of", scale=6, elem_id="explain"
            )
            self.explainer = gr.Dropdown(
                render.explainer_choices(),
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

    def connect(self, others: list[gr.Tab]) -> None:
        """Let the tab answer; `others` are the page's other tabs, locked while a student reads first."""
        self._others = others
        view = [self.explain, self.colours, self.scale]  # the fields of render.View
        gr.on(  # at once, in the browser: other people's X-rays may be ahead in the queue
            [self.drop.upload, *(button.click for button in self.phantoms.values())],
            None, None, self.status, js=f"() => {json.dumps(render.stage('Waiting for its turn …'))}",
            trigger_mode="multiple", **_PRIVATE,
        )  # fmt: skip
        answers = [
            self.found, self.summary, self.limits, self.explain, self.explainer, self.progress, self.cards, self.notes,
            self.guess,
        ]  # fmt: skip
        revealed = [self.pictures, self.headline, self.withheld, self.anyway, self.claim, self.result]
        shown = [
            self.drop, self.status, self.read, self.verdict, self.saved, self.quiz_panel, self.centre, self.width,
            self.inverted, *answers, *revealed, *others,
        ]  # fmt: skip
        event = {"outputs": shown, "show_progress": "hidden"} | _PRIVATE | ANALYSES
        options = [self.found, self.quiz, self.families, self.explainer, *view]
        self.drop.upload(self._answer_upload, [self.drop, *options], preprocess=False, trigger_mode="multiple", **event)
        for name, button in self.phantoms.items():
            button.click(self._answer_phantom(name), options, **event)
        self.guess.input(
            self._reveal, [self.found, self.guess, self.score],
            [self.quiz_panel, self.verdict, self.score, *revealed, *others], queue=False, show_progress="hidden",
            **_PRIVATE,
        )  # fmt: skip
        self.anyway.click(
            lambda: (gr.update(visible=False), gr.update(visible=True), gr.update(visible=True)), None,
            [self.anyway, self.claim, self.result], queue=False, show_progress="hidden", **_PRIVATE,
        )  # fmt: skip
        gr.on(
            [control.input for control in view], self._redraw, [self.found, *view], self.cards, queue=False,
            show_progress="hidden", trigger_mode="always_last", **_PRIVATE,
        )  # fmt: skip
        gr.on(
            [self.explainer.input, self.families.input], self._ask, [self.found, self.families, self.explainer, *view],
            answers, show_progress="hidden", trigger_mode="multiple", **_PRIVATE, **EXPLANATIONS,
        )  # fmt: skip
        for kind, button in self.save.items():
            made = button.click(self._report(kind), [self.found, self.note], self.saved, queue=False, **_PRIVATE)
            made.then(None, js="() => document.querySelector('#saved a')?.click()", **_PRIVATE)
        filing.connect(self.dicom, self.found, self.saved, self.networks, self.uploads, **_PRIVATE)
        self._connect_browser()

    def _connect_browser(self) -> None:
        """What needs no server: opacity, window, outline."""
        only = {"fn": None} | _PRIVATE
        window = [self.centre, self.width, self.inverted]
        self.opacity.input(inputs=self.opacity, js=_sets("--heat"), **only)
        gr.on([control.change for control in window], inputs=window, js=_WINDOW, **only)
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

    def _answer_upload(
        self, file: dict, film: Film | None, quiz: bool, families: list[str], explainer: str, explain: str,
        colours: str, scale: str, request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        name, view = Path(str((file or {}).get("orig_name") or "")).name, render.View(explain, colours, scale)
        yield from self._answer(
            lambda: self.uploads.read(file), name, film, quiz, families, explainer, view, request.session_hash
        )

    def _answer_phantom(self, name: str) -> Callable:
        seed, opacity = PHANTOMS[name]

        def answer(
            film: Film | None, quiz: bool, families: list[str], explainer: str, explain: str, colours: str, scale: str,
            request: gr.Request,
        ) -> Iterator[dict]:  # fmt: skip
            drawn, view = f"phantom, {name.lower()}", render.View(explain, colours, scale)
            yield from self._answer(
                lambda: phantom(seed=seed, opacity=opacity), drawn, film, quiz, families, explainer, view,
                request.session_hash,
            )  # fmt: skip

        return answer

    def _answer(
        self, read: Callable[[], XRay], name: str, before: Film | None, quiz: bool, families: list[str],
        explainer: str, view: render.View, session: str,
    ) -> Iterator[dict]:  # fmt: skip
        """What the page shows, stage by stage, of the X-ray that `read` returns; `before` it, another was shown."""
        yield {self.status: render.stage("Reading the picture …")}
        x, sentence = None, _FAILED
        try:
            x = read()
        except XRayError as error:
            sentence = str(error)
        except Exception:
            logging.exception("The reading failed.")
        if x is None:  # what is shown stays
            refused = render.refusal(name, sentence, None if before is None else before.name)
            yield {self.drop: None, self.status: refused + ("" if before is None else _warnings(before))}
            return
        self.newest.forget(session)
        yield {
            self.drop: None,
            self.status: render.stage("Loading the models …"),
            self.read: "",
            self.pictures: render.film(resize(x.pixels, render.fit(x.pixels.shape, KEEP_SIDE)), x.pixels.shape),
            self.headline: gr.update(visible=False),
            self.result: gr.update(visible=False),
            self.quiz_panel: gr.update(visible=False),
            self.verdict: "",
            self.progress: "",
            self.found: None,
            self.saved: "",
            self.centre: 0.5,
            self.width: 1,
            self.inverted: False,
        }
        try:
            models = self._models(families)
            yield {self.status: render.stage(f"Segmenting the lungs and running {len(models)} networks …")}
            analysis = self.networks.analyze(x, models=models, explainer=self._at_once(explainer, models))
            film = self.networks.keep(x, analysis, name)
        except (XRayError, WeightsError) as error:
            yield self._failure(str(error))
        except Exception:
            logging.exception("The analysis failed.")
            yield self._failure(_FAILED)
        else:
            yield self._shown(film, quiz, view)

    def _models(self, families: list[str]) -> list[str]:
        """The networks of the chosen families; all of them where there is nothing to choose."""
        networks = self.networks
        return networks.of_tasks(families) if len(networks.tasks()) > 1 else networks.get().models

    def _failure(self, sentence: str) -> dict:
        refused = {self.status: render.alert("Not analysed", [sentence]), self.pictures: render.EMPTY}
        return refused | self._locked(False)

    def _at_once(self, name: str, models: list[str]) -> str:
        """This explainer, if it suits all these networks and is fast: minutes are spent only when asked for."""
        suits = self.networks.suited(name, models) == models
        return name if suits and not get_explainer(name).slow else DEFAULT

    def _shown(self, film: Film, quiz: bool, view: render.View) -> dict:
        quiz = quiz and bool(film.analysis.tasks)
        return (
            self._answers(film, view)
            | {
                self.status: _warnings(film),
                self.read: render.provenance(film.name, film.read_at, film.sha256),
                self.quiz_panel: gr.update(visible=quiz),
            }
            | self._locked(quiz)
            | ({} if quiz else self._revealed(film))
        )

    def _revealed(self, film: Film) -> dict:
        """The masks, and what the networks say, or why that is withheld."""
        analysis = film.analysis
        pictures = render.pictures(analysis.original, film.shape, analysis.segmentation, self.networks.whole())
        return {
            self.pictures: pictures,
            self.headline: gr.update(visible=True),
            self.withheld: render.withheld(analysis.withheld),
            self.anyway: gr.update(visible=not analysis.reliable),
            self.claim: gr.update(visible=analysis.reliable),
            self.result: gr.update(visible=analysis.reliable),
        }

    def _locked(self, locked: bool) -> dict:
        """The other tabs, which show the networks' predictions too."""
        return {tab: gr.update(interactive=not locked) for tab in self._others}

    def _answers(self, film: Film, view: render.View) -> dict:
        """What the networks say of a film."""
        analysis, task = film.analysis, render.reading_task(film.analysis)
        choices = render.choices(analysis.tasks)
        if view.explain not in dict(choices).values():
            view = replace(view, explain=render.PREDICTED)
        return {
            self.found: film,
            self.summary: render.summary(analysis),
            self.limits: render.limits(analysis),
            self.explain: gr.update(choices=choices, value=view.explain),
            self.explainer: analysis.explainer,
            self.progress: "",
            self.cards: render.cards(analysis, view),
            self.notes: render.notes(analysis),
            self.guess: gr.update(choices=render.choices([task.name])[1:] if task else [], value=None),
        }

    def _ask(
        self, film: Film | None, families: list[str], name: str, explain: str, colours: str, scale: str,
        request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        """Other heatmaps of the X-ray that is shown, or what further networks say of it."""
        if film is None:
            yield {self.progress: render.alert("The result has expired", ["Drop the X-ray again."])}
            return
        known, models = film.analysis.readings, self._models(families)
        if self.networks.suited(name, models) != models:
            if name != film.analysis.explainer:
                yield self._unexplained(film, name, "It does not suit all networks that answer; choose another method.")
                return
            name = DEFAULT  # the networks are what was changed
        title = get_explainer(name).title
        missing = models if name != film.analysis.explainer else [model for model in models if model not in known]

        def work(progress: Callable[[float, int], None]) -> Film:
            found = self.networks.again(film, missing, progress, explainer=name)
            readings = {model: (known | found.readings)[model] for model in models}
            return replace(film, analysis=replace(found, readings=readings, explainer=name))

        def told(done: float, count: int) -> dict:
            text = f"Computing heatmaps by {title}: network {min(int(done) + 1, count)} of {count}"
            return {self.progress: render.stage(f"{text}, {done / count:.0%} …")}

        yield {self.progress: render.stage(f"Computing heatmaps by {title} …")}
        try:
            film = yield from self.newest.run(request.session_hash, work, told)
        except Superseded:
            return
        except Exception:
            logging.exception("The explanation failed.")
            yield self._unexplained(film, name, "They could not be computed, and the server’s log says why.")
            return
        yield self._answers(film, render.View(explain, colours, scale))

    def _unexplained(self, film: Film, name: str, sentence: str) -> dict:
        return {
            self.progress: render.alert(f"No heatmaps by {get_explainer(name).title}", [sentence]),
            self.explainer: film.analysis.explainer,
        }

    def _reveal(self, film: Film | None, guess: str, score: tuple[int, int]) -> dict:
        if film is None:
            expired = render.alert("The result has expired", ["Drop the X-ray again."])
            return {self.quiz_panel: gr.update(visible=False), self.verdict: expired} | self._locked(False)
        analysis, verdict = film.analysis, ""
        task = render.reading_task(analysis)
        if task is not None and analysis.reliable:  # otherwise there is nothing to agree with
            score = (score[0] + (guess in analysis.leading_of(task.name)), score[1] + 1)
            verdict = render.verdict(guess, analysis.votes_of(task.name), score)
        shown = {self.quiz_panel: gr.update(visible=False), self.verdict: verdict, self.score: score}
        return shown | self._locked(False) | self._revealed(film)

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
            title = render.told(film.name, film.read_at, film.sha256)
            save_report(film.analysis, page, title, note[:LONGEST_NOTE], hashes, kind)
            data = base64.b64encode(page.getvalue()).decode()
            return f'<a download="{name}" href="data:{media};base64,{data}">Save {name} again</a>'

        return report


def _warnings(film: Film) -> str:
    """The warnings that are not told as reasons why the reading is withheld."""
    analysis = film.analysis
    return render.alert("Warning", [warning for warning in analysis.warnings if warning not in analysis.withheld])


def _html(value: str = "", **options) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


def _sets(variable: str, value: str = "value") -> str:
    """JavaScript that sets a CSS variable of the page to an expression of a control's `value`."""
    return f"value => document.querySelector('.gradio-container').style.setProperty('{variable}', {value})"
