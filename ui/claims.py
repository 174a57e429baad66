"""How often what all networks say is right on X-rays of other hospitals, from the recorded evidence, in sentences."""

import json
from html import escape
from pathlib import Path

from manet_core import Analysis
from manet_core.tasks import Task, get_task
from manet_core.weights import fingerprint

from .render import shown_name

_PLACES = {"external": "X-rays of other hospitals", "test": "test X-rays of the training hospitals"}
_FEWEST = 10  # X-rays, below which a share says nothing


class Claims:
    """The figures of `train.evidence --only agreement`, for the very networks and weights that they were measured of.

    Args:
        results: folder with evidence.json; without it, or where it is damaged, nothing is known.
        entries: the manifest's.
    """

    def __init__(self, results: Path, entries: dict[str, dict]):
        try:
            evidence = json.loads((results / "evidence.json").read_text(encoding="utf-8"))
            measured = {name: model["sha256"] for name, model in evidence["models"].items()}
            self._found = evidence.get("agreement", {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            measured, self._found = {}, {}
        self._known = {name for name, entry in entries.items() if measured.get(name) == fingerprint(entry)}

    def _of(self, task: Task, analysis: Analysis) -> dict[str, dict]:
        """{split: figures} where they were measured of exactly the networks that answered."""
        asked = set(analysis.readings_of(task.name))
        found = self._found.get(task.name, {})
        return {s: f for s, f in found.items() if s in _PLACES and set(f["models"]) == asked and asked <= self._known}

    def on(self, task: Task, analysis: Analysis) -> str:
        """A sentence on the class that all networks of a task name: on how many X-rays with and without it they do."""
        (name,), count = analysis.votes_of(task.name), len(analysis.readings_of(task.name))
        unknown = []
        for split, place in _PLACES.items():
            found = self._of(task, analysis).get(split, {})
            claim = found.get("claims", {}).get(name, {})
            if claim.get("n", 0) < _FEWEST:
                unknown.append(f"There are no figures for {place}.")
                continue
            found = f"{_percent(claim['found'])} of those labelled {shown_name(name)} (n = {claim['n']})"
            told = f"On {place}, all {count} said so of {found}"
            if claim.get("others", 0) >= _FEWEST:
                told += f" and, wrongly, of {_percent(claim['wrongly'])} of the others (n = {claim['others']})"
            return " ".join([*unknown, f"{told}."])
        return "How often these networks are right when they agree on this was not measured."

    def on_division(self, task: Task, analysis: Analysis) -> str:
        """A sentence on networks of a task that disagree."""
        said = _said(task, analysis)
        for split, place in _PLACES.items():
            divided = self._of(task, analysis).get(split, {}).get("groups", {}).get("divided")
            if divided and divided["n"] >= _FEWEST:
                right = f"most of them were right in {_percent(divided['accuracy'])} (n = {divided['n']})"
                return f"The networks disagree ({said}). On {place} on which they did, {right}."
        return f"The networks disagree ({said})."

    def doubts(self, analysis: Analysis) -> list[str]:
        """Why no class should be named: what `analysis.withheld` says, or that the networks of all tasks disagree."""
        if analysis.withheld:
            return analysis.withheld
        if all_divided(analysis):
            return [self.on_division(get_task(name), analysis) for name in analysis.tasks]
        return []


def all_divided(analysis: Analysis) -> bool:
    """Whether the networks of every task that was asked disagree."""
    return bool(analysis.tasks) and all(map(analysis.divided_of, analysis.tasks))


def _percent(figure: dict[str, float]) -> str:
    return f"{figure['value']:.0%} ({100 * figure['low']:.0f}–{100 * figure['high']:.0f})"


def summary(analysis: Analysis, claims: Claims) -> str:
    """HTML: for each task what its networks say, and how often that is right elsewhere; "" if `doubts` tells it."""
    if not analysis.readings:
        return '<h2 class="summary">No network was asked; only the lungs were segmented.</h2>'
    if all_divided(analysis) and not analysis.withheld:
        return ""
    return "".join(_summary(get_task(name), analysis, claims) for name in analysis.tasks)


def _summary(task: Task, analysis: Analysis, claims: Claims) -> str:
    votes, count = analysis.votes_of(task.name), len(analysis.readings_of(task.name))
    title = f"{escape(task.title)}. " if len(analysis.tasks) > 1 else ""
    if not task.exclusive:
        found = ", ".join(f"<b>{escape(shown_name(name))}</b> by {n} of {count}" for name, n in votes.items()) or "none"
        return f'<h2 class="summary">{title}Findings of 50% or more: {found}</h2>'
    if analysis.divided_of(task.name):
        doubt = escape(claims.on_division(task, analysis))
        return f'<h2 class="summary">{title}<b>No reliable reading</b></h2><p class="evidence">{doubt}</p>'
    (name,) = votes
    start = "Predicted" if count == 1 else f"All {count} networks"
    claim = f'<h2 class="summary">{title}{start}: <b>{escape(shown_name(name))}</b></h2>'
    return f'{claim}<p class="evidence">{escape(claims.on(task, analysis))}</p>'


def claimed(analysis: Analysis) -> str:
    """What the networks say, in a few words without markup."""
    if analysis.withheld or all_divided(analysis):
        return "No reliable reading"
    return "; ".join(_said(get_task(name), analysis) or "no finding" for name in analysis.tasks)


def _said(task: Task, analysis: Analysis) -> str:
    count = len(analysis.readings_of(task.name))
    return ", ".join(f"{shown_name(name)} by {n} of {count}" for name, n in analysis.votes_of(task.name).items())
