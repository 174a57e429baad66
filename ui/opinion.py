"""The tab for one X-ray: the viewer, the readings beside it, heatmaps by any explainer, the report; and the quiz."""

import base64
import io
import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from manet_core import WeightsError, XRay, XRayError
from manet_core.explain import DEFAULT, get_explainer
from manet_core.phantom import phantom
from manet_core.pose import FAULTS, mended
from manet_core.report import save_report
from manet_core.tasks import get_task

from . import cases, filing, render, viewer
from .case_panel import CasePanel
from .cases import CaseList
from .claims import Claims, claimed, summary
from .lessons import CHOOSE, LESSONS, gallery, lesson
from .networks import ANALYSES, EXPLANATIONS, Film, Networks, results_of
from .newest import Newest, Superseded
from .startup import bare_html, gr
from .uploads import Uploads

PHANTOMS = {"Clear lungs": (0, 0.0), "Faint shadow": (1, 0.5), "Dense shadow": (2, 1.0)}  # name: (seed, opacity)
KEEP_S = 1800  # seconds for which a result waits for another class to be chosen, or for a report
LONGEST_NOTE = 600  # characters
_FAILED = "The analysis failed, and the server’s log says why; try another picture."
_PRIVATE = {"api_visibility": "private"}


@dataclass
class Shelf:
    """The films of a page that can be shown again.

    Attributes:
        films: {key: film}, no more than the viewer has.
        unread: keys of those that a student has still to read.
        faulty: the newest film's key and the film itself, where it is presented wrongly; see `manet_core.pose`.
        cases: {key: number of its case} of films of the lecturer's list.
    """

    films: OrderedDict[str, Film] = field(default_factory=OrderedDict)
    unread: set[str] = field(default_factory=set)
    faulty: tuple[str, XRay] | None = None
    cases: dict[str, int] = field(default_factory=dict)

    def put(self, film: Film) -> None:
        """Add a film, or what is now known of it."""
        self.films[film.key] = film
        while len(self.films) > viewer.KEPT:
            self.unread.discard(self.films.popitem(last=False)[0])


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
        waiting: where films are put for the page to fetch.
        cases: what a lecturer prepared for students to read; None: nothing.

    Attributes:
        status: the line that says what is being done, or what went wrong.
    """

    def __init__(
        self, networks: Networks, uploads: Uploads, newest: Newest, found: gr.State, waiting: viewer.Waiting,
        cases: CaseList | None = None,
    ):  # fmt: skip
        self.networks, self.uploads, self.newest, self.found = networks, uploads, newest, found
        self.waiting, self.cases = waiting, cases
        self._draw()

    def _draw(self) -> None:
        tasks = self.networks.tasks()
        self.score = gr.State((0, 0))  # of “read first”: agreements with the networks, X-rays read
        self.shelf = gr.State(Shelf(), time_to_live=KEEP_S)
        with gr.Row(equal_height=True, elem_id="top"):
            self.drop = gr.File(label="X-ray", show_label=False, height=76, scale=3, elem_id="drop")
            with gr.Column(scale=2, elem_classes="phantoms"):
                hint = "<span class='hint'>No X-ray at hand? </span>"
                bare_html(f"<p>{hint}Try a drawing: <b>synthetic phantom, not a person.</b></p>")
                with gr.Row(equal_height=True):
                    self.phantoms = {name: gr.Button(name, size="sm", min_width=90) for name in PHANTOMS}
                self.quiz = gr.Checkbox(label="Read first, then see the networks’ predictions", container=False)
        self.case_panel = CasePanel(self.cases)
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=1, elem_id="film-side"):
                self.viewer = bare_html(viewer.shell(), elem_id="viewer", js_on_load=viewer.SCRIPT)
                # Not outputs of the viewer itself, which would be drawn anew and lose its view.
                self.film, self.layers = (
                    gr.HTML("", html_template="", js_on_load=viewer.COURIER.format(name), elem_classes="courier")
                    for name in ("film", "layers")
                )
            with gr.Column(scale=0, min_width=372, elem_id="reading-side"):
                self._draw_reading(tasks)
        with gr.Column(visible=False) as self.result:
            self.limits = bare_html()
            self.notes = bare_html(elem_id="notes")
            with gr.Accordion("Report on one page", open=False, elem_id="report"):
                self.note = gr.Textbox(
                    label="Note, printed on the report and kept nowhere", lines=2, max_length=LONGEST_NOTE
                )
                with gr.Row():
                    self.save = {kind: gr.Button(f"Save as {kind.upper()}", size="sm") for kind in ("pdf", "png")}
                    self.dicom = filing.dicom_button()
                self.saved = bare_html(elem_id="saved")
        with gr.Accordion("Phantoms for lessons: one chest, one thing changed", open=False, elem_id="lessons") as drawn:
            self.lessons = bare_html(js_on_load=CHOOSE)
        drawn.expand(gallery, None, self.lessons, queue=False, show_progress="hidden", **_PRIVATE)

    def _draw_reading(self, tasks: list[str]) -> None:
        """The column beside the film."""
        self.status = bare_html(elem_id="status", elem_classes="told")
        with gr.Column(visible=False) as self.quiz_panel:
            self.guess = gr.Radio([], label="What do you see? Then the networks’ predictions appear.", elem_id="quiz")
        self.verdict = bare_html(elem_id="verdict", elem_classes="told")
        with gr.Column(visible=False, elem_id="headline") as self.headline:
            self.withheld = bare_html(elem_id="withheld", elem_classes="told")
            self.mend = gr.Button(visible=False, size="sm", elem_id="mend")
            self.anyway = gr.Button("Show the networks’ answers anyway", size="sm", elem_id="anyway")
            with gr.Column() as self.claim:
                self.summary = bare_html(elem_id="summary")
                self.readings = bare_html(elem_id="readings")
                self.explainer = gr.Dropdown(
                    render.explainer_choices(), value=DEFAULT, label="Method of heatmaps", elem_id="explainer"
                )
                self.progress = bare_html(elem_id="explaining", elem_classes="told")
        self.families = gr.CheckboxGroup(
            [(get_task(name).title, name) for name in tasks], value=tasks[:1], label="Networks that answer",
            visible=len(tasks) > 1, elem_id="families",
        )  # fmt: skip
        self.read = bare_html(elem_id="read", elem_classes="told")

    def connect(self, others: list[gr.Tab]) -> None:
        """Let the tab answer; `others` are the page's other tabs, locked while a student reads first."""
        self._others = others
        gr.on(  # at once, in the browser: other people's X-rays may be ahead in the queue
            [
                self.drop.upload, self.mend.click, self.case_panel.show.click, self.lessons.submit,
                *(button.click for button in self.phantoms.values()),
            ],
            None, None, self.status, js=f"() => {json.dumps(render.stage('Waiting for its turn …'))}",
            trigger_mode="multiple", **_PRIVATE,
        )  # fmt: skip
        quick = {"queue": False, "show_progress": "hidden"} | _PRIVATE
        answers = [
            self.found, self.shelf, self.summary, self.readings, self.limits, self.explainer, self.progress, self.notes,
            self.guess,
        ]  # fmt: skip
        revealed = [self.layers, self.headline, self.withheld, self.mend, self.anyway, self.claim, self.result]
        told = [self.status, self.read, self.verdict, self.saved, self.quiz_panel, *answers, *revealed, *others]
        event = {"outputs": [self.drop, self.film, *told], "show_progress": "hidden"} | _PRIVATE | ANALYSES
        options = [self.found, self.shelf, self.quiz, self.families, self.explainer]
        self.drop.upload(self._answer_upload, [self.drop, *options], preprocess=False, trigger_mode="multiple", **event)
        for name, button in self.phantoms.items():
            button.click(self._answer_phantom(name), options, **event)
        self.lessons.submit(self._answer_lesson, options, **event)
        self.mend.click(self._answer_mended, options, **event)
        self.case_panel.show.click(self._answer_case, [self.case_panel.answers, *options], **event)
        self.viewer.submit(self._open, self.shelf, told, trigger_mode="always_last", **quick)
        self.guess.input(
            self._reveal, [self.found, self.shelf, self.guess, self.score, self.case_panel.answers],
            [self.quiz_panel, self.verdict, self.score, *answers, *revealed, *self.case_panel.answered, *others],
            **quick,
        )  # fmt: skip
        self.anyway.click(self._show_anyway, self.found, [self.anyway, self.claim, self.result, self.layers], **quick)
        gr.on(
            [self.explainer.input, self.families.input], self._ask,
            [self.found, self.shelf, self.families, self.explainer], [*answers, self.layers],
            show_progress="hidden", trigger_mode="multiple", **_PRIVATE, **EXPLANATIONS,
        )  # fmt: skip
        for kind, button in self.save.items():
            made = button.click(self._report(kind), [self.found, self.note], self.saved, queue=False, **_PRIVATE)
            made.then(None, js="() => document.querySelector('#saved a')?.click()", **_PRIVATE)
        filing.connect(self.dicom, self.found, self.saved, self.networks, self.uploads, **_PRIVATE)

    def check_weights(self) -> str:
        """For the status line of a page that was just opened: a sentence where weights are missing."""
        try:
            self.networks.warm()
        except WeightsError as error:
            return render.alert("No analysis is possible", [str(error)])
        return gr.skip()

    def _answer_upload(
        self, file: dict, film: Film | None, shelf: Shelf, quiz: bool, families: list[str], explainer: str,
        request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        name = Path(str((file or {}).get("orig_name") or "")).name
        yield from self._answer(
            lambda: self.uploads.read(file), name, film, shelf, quiz, families, explainer, request.session_hash
        )

    def _answer_phantom(self, name: str) -> Callable:
        seed, opacity = PHANTOMS[name]

        def answer(
            film: Film | None, shelf: Shelf, quiz: bool, families: list[str], explainer: str, request: gr.Request
        ) -> Iterator[dict]:
            drawn = f"phantom, {name.lower()}"
            yield from self._answer(
                lambda: phantom(seed=seed, opacity=opacity), drawn, film, shelf, quiz, families, explainer,
                request.session_hash,
            )  # fmt: skip

        return answer

    def _answer_lesson(
        self, film: Film | None, shelf: Shelf, quiz: bool, families: list[str], explainer: str, event: gr.EventData,
        request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        name = str(event.lesson)
        if name not in LESSONS:
            yield {self.status: render.alert("Not analysed", ["There is no such phantom."])}
            return
        drawn = f"phantom, {name[0].lower()}{name[1:]}"
        yield from self._answer(
            lambda: lesson(name), drawn, film, shelf, quiz, families, explainer, request.session_hash
        )

    def _answer_mended(
        self, film: Film | None, shelf: Shelf, quiz: bool, families: list[str], explainer: str, request: gr.Request
    ) -> Iterator[dict]:
        """The film that is shown, put right."""
        if film is None or shelf.faulty is None or shelf.faulty[0] != film.key:
            yield {self.status: render.alert("The film has expired", ["Drop it again."])}
            return
        x, fault = shelf.faulty[1], film.analysis.fault
        yield from self._answer(
            lambda: mended(x, fault), film.name, film, shelf, quiz, families, explainer, request.session_hash
        )

    def _answer_case(
        self, answers: dict[int, str], film: Film | None, shelf: Shelf, quiz: bool, families: list[str],
        explainer: str, request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        """The first film of the lecturer's list without an answer; its name may give it away and is not told."""
        number = None if self.cases is None else self.cases.next_of(answers)
        if number is None:
            yield {self.status: render.alert("No further case", ["Every film of the case list has an answer."])}
            return
        read, name = self.cases.cases[number].read, f"Case {number + 1}"
        yield from self._answer(read, name, film, shelf, True, families, explainer, request.session_hash, number)

    def _answer(
        self, read: Callable[[], XRay], name: str, before: Film | None, shelf: Shelf, quiz: bool, families: list[str],
        explainer: str, session: str, case: int | None = None,
    ) -> Iterator[dict]:  # fmt: skip
        """What the page shows, stage by stage, of the X-ray that `read` returns.

        `before` it, another was shown; it may be one of the lecturer's list, `case` its number.
        """
        yield {self.status: render.stage("Reading the picture …")}
        x, sentence, key = None, _FAILED, uuid.uuid4().hex
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
            self.film: viewer.film_text(x, key, name, self.waiting),
            self.headline: gr.update(visible=False),
            self.result: gr.update(visible=False),
            self.quiz_panel: gr.update(visible=False),
            self.verdict: "",
            self.progress: "",
            self.found: None,
            self.saved: "",
        }
        try:
            models = self._models(families)
            yield {self.status: render.stage(f"Segmenting the lungs and running {len(models)} networks …")}
            analysis = self.networks.analyze(x, models=models, explainer=self._at_once(explainer, models))
            film = self.networks.keep(x, analysis, name, key)
        except (XRayError, WeightsError) as error:
            yield self._failure(str(error))
        except Exception:
            logging.exception("The analysis failed.")
            yield self._failure(_FAILED)
        else:
            shelf.faulty = None if analysis.fault is None else (key, x)
            if case is not None:
                shelf.cases[key] = case
            if case is not None or quiz and analysis.tasks:
                shelf.unread.add(key)
            yield self._shown(film, shelf)

    def _models(self, families: list[str]) -> list[str]:
        """The networks of the chosen families; all of them where there is nothing to choose."""
        networks = self.networks
        return networks.of_tasks(families) if len(networks.tasks()) > 1 else networks.get().models

    def _failure(self, sentence: str) -> dict:
        return {self.status: render.alert("Not analysed", [sentence])} | self._locked(False)

    def _at_once(self, name: str, models: list[str]) -> str:
        """This explainer, if it suits all these networks and is fast: minutes are spent only when asked for."""
        suits = self.networks.suited(name, models) == models
        return name if suits and not get_explainer(name).slow else DEFAULT

    def _open(self, shelf: Shelf, event: gr.EventData) -> dict:
        """Show one of the page's last films again."""
        film = shelf.films.get(str(event.film))
        if film is None:
            expired = render.alert("The result has expired", ["Drop the X-ray again."])
            hidden = {part: gr.update(visible=False) for part in (self.headline, self.result, self.quiz_panel)}
            return {self.status: expired, self.read: "", self.verdict: "", self.found: None} | hidden
        return self._shown(film, shelf) | {self.verdict: "", self.saved: ""}

    def _shown(self, film: Film, shelf: Shelf) -> dict:
        """A film and what is said of it, as far as it may be seen."""
        unread = film.key in shelf.unread
        hidden = {part: gr.update(visible=False) for part in (self.headline, self.result)}
        return (
            self._answers(film, shelf)
            | {
                self.status: _warnings(film),
                self.read: render.provenance(film.name, film.read_at, film.sha256),
                self.quiz_panel: gr.update(visible=unread),
            }
            | self._locked(unread)
            | (hidden if unread else self._revealed(film, shelf))
        )

    def _revealed(self, film: Film, shelf: Shelf) -> dict:
        """The masks, and what the networks say, or why that is withheld."""
        doubts, fault = self.claims.doubts(film.analysis), film.analysis.fault
        mendable = fault is not None and shelf.faulty is not None and shelf.faulty[0] == film.key
        return {
            self.layers: self._layers(film, not doubts),
            self.headline: gr.update(visible=True),
            self.withheld: render.withheld(doubts),
            self.mend: gr.update(value=f"{FAULTS[fault].action} and read it again", visible=True)
            if mendable
            else gr.update(visible=False),
            self.anyway: gr.update(visible=bool(doubts)),
            self.claim: gr.update(visible=not doubts),
            self.result: gr.update(visible=not doubts),
        }

    @cached_property
    def claims(self) -> Claims:
        """What is known of the networks' claims; first asked for when they are loaded."""
        return Claims(results_of(self.networks.weights), self.networks.get().entries)

    def _layers(self, film: Film, heatmaps: bool) -> str:
        return viewer.layers_text(film, self.networks.whole(), heatmaps)

    def _show_anyway(self, film: Film | None) -> dict:
        shown = {self.anyway: gr.update(visible=False)}
        shown |= {part: gr.update(visible=True) for part in (self.claim, self.result)}
        return shown if film is None else shown | {self.layers: self._layers(film, True)}

    def _locked(self, locked: bool) -> dict:
        """The other tabs, which show the networks' predictions too."""
        return {tab: gr.update(interactive=not locked) for tab in self._others}

    def _answers(self, film: Film, shelf: Shelf) -> dict:
        """What the networks say of a film; nothing of it while a student has still to read it."""
        shelf.put(film)
        analysis, task = film.analysis, render.reading_task(film.analysis)
        task = self.cases.task if film.key in shelf.cases else task
        shown = {
            self.found: film,
            self.shelf: shelf,
            self.explainer: analysis.explainer,
            self.progress: "",
            self.guess: gr.update(choices=render.choices(task) if task else [], value=None),
        }
        if film.key in shelf.unread:
            return shown
        return shown | {
            self.summary: summary(analysis, self.claims),
            self.readings: render.readings(analysis),
            self.limits: render.limits(analysis),
            self.notes: render.notes(analysis),
        }

    def _ask(
        self, film: Film | None, shelf: Shelf, families: list[str], name: str, request: gr.Request
    ) -> Iterator[dict]:
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
        answers = self._answers(film, shelf)
        yield answers if film.key in shelf.unread else answers | {self.layers: self._layers(film, True)}

    def _unexplained(self, film: Film, name: str, sentence: str) -> dict:
        return {
            self.progress: render.alert(f"No heatmaps by {get_explainer(name).title}", [sentence]),
            self.explainer: film.analysis.explainer,
        }

    def _reveal(
        self, film: Film | None, shelf: Shelf, guess: str, score: tuple[int, int], answers: dict[int, str]
    ) -> dict:
        if film is None:
            expired = render.alert("The result has expired", ["Drop the X-ray again."])
            return {self.quiz_panel: gr.update(visible=False), self.verdict: expired} | self._locked(False)
        analysis, verdict = film.analysis, ""
        shelf.unread.discard(film.key)
        shown = {self.quiz_panel: gr.update(visible=False)} | self._locked(False)
        shown |= self._answers(film, shelf) | self._revealed(film, shelf)
        if film.key in shelf.cases:
            number = shelf.cases[film.key]
            answers.setdefault(number, guess)
            shown[self.verdict] = cases.verdict(self.cases, number, answers[number], claimed(analysis))
            return shown | self.case_panel.after(answers)
        task = render.reading_task(analysis)
        if task is not None and analysis.reliable:  # otherwise there is nothing to agree with
            score = (score[0] + (guess in analysis.leading_of(task.name)), score[1] + 1)
            verdict = render.verdict(guess, analysis.votes_of(task.name), score)
        return shown | {self.verdict: verdict, self.score: score}

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
