"""The line above the film where a lecturer's case list is read: the next film, the score, the answers to keep."""

import base64

from . import cases
from .cases import LONGEST_NAME, CaseList
from .startup import bare_html, gr

_SAVED = "MANet-answers.csv"
_PRIVATE = {"api_visibility": "private"}


class CasePanel:
    """Draws itself into the page that is being built; nothing is seen of it where there is no list.

    Args:
        listed: the films.

    Attributes:
        answers: state of a page's session, {number of a case: the class that the student answered}.
        show: the button that asks for the next film.
        answered: the components that `after` is of.
    """

    def __init__(self, listed: CaseList | None):
        self._listed = listed
        self.answers = gr.State({})
        with gr.Column(visible=listed is not None, elem_id="cases"):
            with gr.Row(equal_height=True):
                self._told = bare_html("" if listed is None else cases.progress(listed, {}))
                self.show = gr.Button("Show case 1", size="sm", variant="primary", min_width=150, scale=0)
                so_far = gr.Button("My score so far", size="sm", visible=False, min_width=150, scale=0)
            self._score = bare_html(elem_id="score", elem_classes="told")
            with gr.Row(visible=False) as self._keep:
                name = gr.Textbox(
                    label="Name to put on my answers", max_length=LONGEST_NAME, max_lines=1, elem_id="student"
                )
                save = gr.Button("Save my answers as CSV", size="sm", scale=0, min_width=200)
                saved = bare_html(elem_id="answers")
        self._so_far, self._saved = so_far, saved
        self.answered = [self.answers, self._told, self.show, so_far, self._score, self._keep, saved]
        quick = {"queue": False, "show_progress": "hidden"} | _PRIVATE
        so_far.click(self._scored, self.answers, [self._score, self._keep], **quick)
        self.show.click(lambda: ("", gr.update(visible=False), ""), None, [self._score, self._keep, saved], **quick)
        made = save.click(self._file, [self.answers, name], saved, **quick)
        made.then(None, js="() => document.querySelector('#answers a')?.click()", **_PRIVATE)

    def after(self, answers: dict[int, str]) -> dict:
        """What is shown after another answer: how far it is, and at the end the score."""
        following = self._listed.next_of(answers)
        shown = {
            self.answers: answers,
            self._told: cases.progress(self._listed, answers),
            self.show: gr.update(value=f"Show case {(following or 0) + 1}", visible=following is not None),
            self._so_far: gr.update(visible=following is not None),
        }
        if following is None:
            shown |= dict(zip((self._score, self._keep), self._scored(answers)))
        return shown

    def _scored(self, answers: dict[int, str]) -> tuple:
        return cases.score(self._listed, answers), gr.update(visible=True)

    def _file(self, answers: dict[int, str], name: str) -> str:
        data = base64.b64encode(
            cases.as_csv(self._listed, answers, (name or "")[:LONGEST_NAME]).encode("utf-8-sig")
        ).decode()
        return f'<a download="{_SAVED}" href="data:text/csv;base64,{data}">Save {_SAVED} again</a>'
