"""The tab for one X-ray: the viewer, the readings beside it, heatmaps by any explainer, the report; and the quiz."""

import base64
import io
import json
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from html import escape
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
from .shelves import Shelf, Shelved, Shelves
from .startup import bare_html, gr
from .uploads import Uploads

PHANTOMS = {"Clear lungs": (0, 0.0), "Faint shadow": (1, 0.5), "Dense shadow": (2, 1.0)}  # name: (seed, opacity)
LONGEST_NOTE = 600  # characters
_FAILED = "The analysis failed, and the server’s log says why; try another picture."
_PRIVATE = {"api_visibility": "private"}


class OpinionTab:
    """Draws the tab into the page that is being built, and answers it.

    The name of an X-ray's file is shown, and printed on the report, so that its reader can tell which film a reading
    belongs to. It stays on this page's shelf, in memory, and goes with it: it is in no log, no file and no answer
    to another page. Nothing else of the file is shown that could tell a patient.

    A page that is reloaded gets back its films and what was said of them.

    Args:
        networks: what reads the X-rays.
        uploads: what reads their files.
        newest: runs what a page asks for later, other heatmaps or further networks.
        found: the state that holds the `Film` that is shown.
        shelves: where the films of pages are kept.
        cases: what a lecturer prepared for students to read; None: nothing.

    Attributes:
        status: the line that says what is being done, or what went wrong.
    """

    def __init__(
        self, networks: Networks, uploads: Uploads, newest: Newest, found: gr.State, shelves: Shelves,
        cases: CaseList | None = None,
    ):  # fmt: skip
        self.networks, self.uploads, self.newest, self.found = networks, uploads, newest, found
        self.shelves, self.cases = shelves, cases
        self._draw()

    def _draw(self) -> None:
        tasks = self.networks.tasks()
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
                self.film, self.layers, self.token = (
                    gr.HTML("", html_template="", js_on_load=viewer.COURIER.format(name), elem_classes="courier")
                    for name in ("films", "layers", "token")
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
                self.on_lesions = bare_html(elem_id="on-lesions")
        self.families = gr.CheckboxGroup(
            [(get_task(name).title, name) for name in tasks], value=tasks[:1], label="Networks that answer",
            visible=len(tasks) > 1, elem_id="families",
        )  # fmt: skip
        self.read = bare_html(elem_id="read", elem_classes="told")

    def connect(self, others: list[gr.Tab]) -> list[gr.components.Component]:
        """Let the tab answer; `others` are the page's other tabs, locked while a student reads first.

        Returns:
            What `restore` changes.
        """
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
            self.found, self.summary, self.readings, self.limits, self.explainer, self.progress, self.on_lesions,
            self.notes, self.guess,
        ]  # fmt: skip
        revealed = [self.layers, self.headline, self.withheld, self.mend, self.anyway, self.claim, self.result]
        told = [self.status, self.read, self.verdict, self.saved, self.quiz_panel, *answers, *revealed, *others]
        event = {"outputs": [self.drop, self.film, *told], "show_progress": "hidden"} | _PRIVATE | ANALYSES
        options = [self.found, self.quiz, self.families, self.explainer]
        self.drop.upload(self._answer_upload, [self.drop, *options], preprocess=False, trigger_mode="multiple", **event)
        for name, button in self.phantoms.items():
            button.click(self._answer_phantom(name), options, **event)
        self.lessons.submit(self._answer_lesson, options, **event)
        self.mend.click(self._answer_mended, options, **event)
        self.case_panel.show.click(self._answer_case, [self.case_panel.answers, *options], **event)
        self.viewer.submit(self._open, None, told, trigger_mode="always_last", **quick)
        self.guess.input(
            self._reveal, [self.found, self.guess, self.case_panel.answers],
            [self.quiz_panel, self.verdict, *answers, *revealed, *self.case_panel.answered, *others],
            preprocess=False, **quick,
        )  # fmt: skip
        self.anyway.click(self._show_anyway, self.found, [self.anyway, self.claim, self.result, self.layers], **quick)
        gr.on(
            [self.explainer.input, self.families.input], self._ask,
            [self.found, self.families, self.explainer], [*answers, self.layers],
            show_progress="hidden", trigger_mode="multiple", **_PRIVATE, **EXPLANATIONS,
        )  # fmt: skip
        for kind, button in self.save.items():
            made = button.click(self._report(kind), [self.found, self.note], self.saved, queue=False, **_PRIVATE)
            made.then(None, js="() => document.querySelector('#saved a')?.click()", **_PRIVATE)
        filing.connect(self.dicom, self.found, self.saved, self.networks, self.uploads, **_PRIVATE)
        return [self.token, self.film, self.quiz, self.families, *told, *self.case_panel.answered]

    def check_weights(self) -> str:
        """For the status line of a page that was just opened: a sentence where weights are missing."""
        try:
            self.networks.warm()
        except WeightsError as error:
            return render.alert("No analysis is possible", [str(error)])
        return gr.skip()

    def _answer_upload(
        self, file: dict, film: Film | None, quiz: bool, families: list[str], explainer: str,
        request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        name = Path(str((file or {}).get("orig_name") or "")).name
        yield from self._answer(lambda: self.uploads.read(file), name, film, quiz, families, explainer, request)

    def _answer_phantom(self, name: str) -> Callable:
        seed, opacity = PHANTOMS[name]

        def answer(
            film: Film | None, quiz: bool, families: list[str], explainer: str, request: gr.Request
        ) -> Iterator[dict]:
            drawn = f"phantom, {name.lower()}"
            yield from self._answer(
                lambda: phantom(seed=seed, opacity=opacity), drawn, film, quiz, families, explainer, request,
            )  # fmt: skip

        return answer

    def _answer_lesson(
        self, film: Film | None, quiz: bool, families: list[str], explainer: str, event: gr.EventData,
        request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        name = str(event.lesson)
        if name not in LESSONS:
            yield {self.status: render.alert("Not analysed", ["There is no such phantom."])}
            return
        drawn = f"phantom, {name[0].lower()}{name[1:]}"
        yield from self._answer(lambda: lesson(name), drawn, film, quiz, families, explainer, request)

    def _answer_mended(
        self, film: Film | None, quiz: bool, families: list[str], explainer: str, request: gr.Request
    ) -> Iterator[dict]:
        """The film that is shown, put right."""
        _, shelved = self._shelved(film, request)
        if shelved is None or shelved.x is None:
            yield {self.status: render.alert("The film has expired", ["Drop it again."])}
            return
        x, fault = shelved.x, film.analysis.fault
        yield from self._answer(lambda: mended(x, fault), film.name, film, quiz, families, explainer, request)

    def _answer_case(
        self, answers: dict[int, str], film: Film | None, quiz: bool, families: list[str],
        explainer: str, request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        """The first film of the lecturer's list without an answer; its name may give it away and is not told."""
        number = None if self.cases is None else self.cases.next_of(answers)
        if number is None:
            yield {self.status: render.alert("No further case", ["Every film of the case list has an answer."])}
            return
        read, name = self.cases.cases[number].read, f"Case {number + 1}"
        yield from self._answer(read, name, film, True, families, explainer, request, number)

    def _answer(
        self, read: Callable[[], XRay], name: str, before: Film | None, quiz: bool, families: list[str],
        explainer: str, request: gr.Request, case: int | None = None,
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
        self.newest.forget(request.session_hash)
        shelf, shelved = self._shelf(request), Shelved(viewer.picture(x, key, name), case=case)
        self.shelves.put(shelf, key, shelved)
        yield {
            self.drop: None,
            self.status: render.stage("Loading the models …"),
            self.read: "",
            self.film: viewer.films_text([shelved.picture], key),
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
            shelved.film, shelved.x = film, None if analysis.fault is None else x
            shelved.unread = case is not None or quiz and bool(analysis.tasks)
            shelf.quiz = quiz if case is None else shelf.quiz
            self.shelves.put(shelf, key, shelved)
            # Layers bring the viewer to their film; without any it must be told, as another may have been opened.
            yield self._shown(shelf, shelved) | ({self.film: viewer.films_text([], key)} if shelved.unread else {})

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

    def _shelf(self, request: gr.Request) -> Shelf:
        return self.shelves.of(request.session_hash, request.username)

    def _shelved(self, film: Film | None, request: gr.Request) -> tuple[Shelf, Shelved | None]:
        """The page's shelf, and what it has of a film; None if nothing."""
        shelf = self._shelf(request)
        return shelf, None if film is None else shelf.films.get(film.key)

    def restore(self, token: str, request: gr.Request) -> dict:
        """What a page that was just loaded is told: its token, and the films that it had before it was reloaded."""
        token, shelf = self.shelves.open(str(token), request.session_hash, request.username)
        told, films = {self.token: token}, shelf.read()
        if self.cases is not None and shelf.answers:
            told |= self.case_panel.after(shelf.answers)
        if not films:
            return told
        shown = next((shelved for shelved in films if shelved.film.key == shelf.shown), films[-1])
        tasks = shown.film.analysis.tasks
        return (
            told
            | self._shown(shelf, shown)
            | {
                self.film: viewer.films_text([shelved.picture for shelved in films], shown.film.key),
                self.quiz: shelf.quiz,
                self.families: tasks if len(self.networks.tasks()) > 1 else gr.skip(),
            }
        )

    def _open(self, event: gr.EventData, request: gr.Request) -> dict:
        """Show one of the page's last films again; or, beside another, what may be seen of it."""
        shelf = self._shelf(request)
        asked = event._data if isinstance(event._data, dict) else {}
        shelved = shelf.films.get(str(asked.get("film")))
        if asked.get("beside"):
            seen = shelved is not None and shelved.film is not None and not shelved.unread
            return {self.layers: self._revealed(shelved)[self.layers]} if seen else {self.layers: gr.skip()}
        self.newest.forget(request.session_hash)  # or what was asked of the film before would be told of this one
        if shelved is None or shelved.film is None:
            expired = render.alert("The result has expired", ["Drop the X-ray again."])
            hidden = {part: gr.update(visible=False) for part in (self.headline, self.result, self.quiz_panel)}
            return {self.status: expired, self.read: "", self.verdict: "", self.found: None} | hidden
        return self._shown(shelf, shelved) | {self.verdict: "", self.saved: ""}

    def _shown(self, shelf: Shelf, shelved: Shelved) -> dict:
        """A film and what is said of it, as far as it may be seen."""
        film, unread = shelved.film, shelved.unread
        hidden = {part: gr.update(visible=False) for part in (self.headline, self.result)}
        return (
            self._answers(shelf, shelved)
            | {
                self.status: _warnings(film),
                self.read: render.provenance(film.name, film.read_at, film.sha256),
                self.quiz_panel: gr.update(visible=unread),
            }
            | self._locked(unread)
            | (hidden if unread else self._revealed(shelved))
        )

    def _revealed(self, shelved: Shelved) -> dict:
        """The masks, and what the networks say, or why that is withheld."""
        film = shelved.film
        doubts, fault = self.claims.doubts(film.analysis), film.analysis.fault
        return {
            self.layers: self._layers(film, not doubts),
            self.headline: gr.update(visible=True),
            self.withheld: render.withheld(doubts),
            self.mend: gr.update(value=f"{FAULTS[fault].action} and read it again", visible=True)
            if shelved.x is not None
            else gr.update(visible=False),
            self.anyway: gr.update(visible=bool(doubts)),
            self.claim: gr.update(visible=not doubts),
            self.result: gr.update(visible=not doubts),
        }

    @cached_property
    def claims(self) -> Claims:
        """What is known of the networks' claims; first asked for when they are loaded."""
        return Claims(self.networks.get().entries, *results_of(self.networks.weights))

    def _layers(self, film: Film, heatmaps: bool) -> str:
        return viewer.layers_text(film, self.networks.whole(), heatmaps, self.networks.means)

    def _show_anyway(self, film: Film | None) -> dict:
        shown = {self.anyway: gr.update(visible=False)}
        shown |= {part: gr.update(visible=True) for part in (self.claim, self.result)}
        return shown if film is None else shown | {self.layers: self._layers(film, True)}

    def _locked(self, locked: bool) -> dict:
        """The other tabs, which show the networks' predictions too."""
        return {tab: gr.update(interactive=not locked) for tab in self._others}

    def _answers(self, shelf: Shelf, shelved: Shelved) -> dict:
        """What the networks say of a film; nothing of it while a student has still to read it."""
        film = shelved.film
        shelf.shown = film.key
        analysis = film.analysis
        task = render.reading_task(analysis) if shelved.case is None else self.cases.task
        shown = {
            self.found: film,
            self.explainer: analysis.explainer,
            self.progress: "",
            self.guess: gr.update(choices=render.choices(task) if task else [], value=None),
        }
        if shelved.unread:
            return shown
        return shown | {
            self.summary: summary(analysis, self.claims),
            self.readings: render.readings(analysis),
            self.limits: render.limits(analysis),
            self.notes: render.notes(analysis),
            self.on_lesions: f'<p class="evidence">{escape(self.claims.on_heatmaps(analysis))}</p>',
        }

    def _ask(self, film: Film | None, families: list[str], name: str, request: gr.Request) -> Iterator[dict]:
        """Other heatmaps of the X-ray that is shown, or what further networks say of it."""
        shelf, shelved = self._shelved(film, request)
        if shelved is None:
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

        def work(progress: Callable[[float, int], None]) -> tuple[Film, str]:
            found = self.networks.again(film, missing, progress, explainer=name)
            readings = {model: (known | found.readings)[model] for model in models}
            again = replace(film, analysis=replace(found, readings=readings, explainer=name))
            return again, self._layers(again, True)

        def told(done: float, count: int) -> dict:
            text = f"Computing heatmaps by {title}: network {min(int(done) + 1, count)} of {count}"
            return {self.progress: render.stage(f"{text}, {done / count:.0%} …")}

        yield {self.progress: render.stage(f"Computing heatmaps by {title} …")}
        try:
            film, layers = yield from self.newest.run(request.session_hash, work, told)
        except Superseded:
            return
        except Exception:
            logging.exception("The explanation failed.")
            yield self._unexplained(film, name, "They could not be computed, and the server’s log says why.")
            return
        shelved.film = film
        self.shelves.put(shelf, film.key, shelved)
        answers = self._answers(shelf, shelved)
        yield answers if shelved.unread else answers | {self.layers: layers}

    def _unexplained(self, film: Film, name: str, sentence: str) -> dict:
        return {
            self.progress: render.alert(f"No heatmaps by {get_explainer(name).title}", [sentence]),
            self.explainer: film.analysis.explainer,
        }

    def _reveal(self, film: Film | None, guess: str, answers: dict[int, str], request: gr.Request) -> dict:
        shelf, shelved = self._shelved(film, request)
        if shelved is None:
            expired = render.alert("The result has expired", ["Drop the X-ray again."])
            return {self.quiz_panel: gr.update(visible=False), self.verdict: expired} | self._locked(False)
        analysis, verdict = film.analysis, ""
        shelved.unread = False
        shown = {self.quiz_panel: gr.update(visible=False)} | self._locked(False)
        shown |= self._answers(shelf, shelved) | self._revealed(shelved)
        if (number := shelved.case) is not None:
            answers.setdefault(number, str(guess))
            shelf.answers = answers
            shown[self.verdict] = cases.verdict(self.cases, number, answers[number], claimed(analysis))
            return shown | self.case_panel.after(answers)
        task = render.reading_task(analysis)
        if task is not None and analysis.reliable:  # otherwise there is nothing to agree with
            shelf.score = (shelf.score[0] + (str(guess) in analysis.leading_of(task.name)), shelf.score[1] + 1)
            verdict = render.verdict(str(guess), analysis.votes_of(task.name), shelf.score)
        return shown | {self.verdict: verdict}

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
