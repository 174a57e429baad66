"""What the recorded evidence tells of an answer, in sentences: how often such a claim is right, whether such heatmaps
lie on lesions.
"""

import json
from html import escape
from pathlib import Path

from manet_core import Analysis
from manet_core.explain import get_explainer, list_explainers
from manet_core.tasks import Task, get_task
from manet_core.weights import fingerprint

from .render import shown_name, titles

_PLACES = {"external": "X-rays of other hospitals", "test": "test X-rays of the training hospitals"}
_SECTIONS = ("agreement", "other_findings", "localisation")
_FEWEST = 10  # X-rays, below which a share says nothing


def _recorded(folder: Path, entries: dict[str, dict]) -> dict[str, tuple[dict, set[str]]]:
    """{section: (its figures, the networks whose weights it was measured of)} of an evidence.json; {} without one."""
    try:
        evidence = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
        of = {section: evidence.get("measured_of", {}).get(section, {}) for section in _SECTIONS}
        return {
            section: (
                evidence.get(section, {}),
                {name for name, entry in entries.items() if weights.get(name) == fingerprint(entry)},
            )
            for section, weights in of.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


class Claims:
    """The figures of `_SECTIONS` of `train.evidence`, each for the very weights that it was measured of.

    Args:
        entries: the manifest's.
        results: folders with evidence.json, one for each set of weights; of those without it, or where it is damaged,
            nothing is known.
    """

    def __init__(self, entries: dict[str, dict], *results: Path):
        self._sets = [found for folder in results if (found := _recorded(folder, entries))]

    def _of(self, section: str, task: Task, analysis: Analysis) -> dict:
        """The figures of a section for a task, where all networks that answered are known to it; {} elsewhere."""
        asked = set(analysis.readings_of(task.name))
        return next((found.get(task.name, {}) for found, known in self._measured(section) if asked <= known), {})

    def _measured(self, section: str) -> list[tuple[dict, set[str]]]:
        """Of each set of weights, the figures of a section and the networks whose weights it was measured of."""
        return [one[section] for one in self._sets]

    def _agreement(self, task: Task, analysis: Analysis) -> dict[str, dict]:
        """{split: figures} where they were measured of exactly the networks that answered."""
        found, asked = self._of("agreement", task, analysis), set(analysis.readings_of(task.name))
        return {split: found[split] for split in _PLACES if set(found.get(split, {}).get("models", ())) == asked}

    def on(self, task: Task, analysis: Analysis) -> str:
        """On the class that all networks of a task claim: for how many X-rays they do, and how often rightly."""
        (name,) = analysis.votes_of(task.name)
        unknown = []
        for split, place in _PLACES.items():
            found = self._agreement(task, analysis).get(split, {})
            claim = found.get("claims", {}).get(name, {})
            if claim.get("n", 0) < _FEWEST:
                unknown.append(f"There are no figures for {place}.")
                continue
            found = f"{_percent(claim['found'])} of those labelled {shown_name(name)} (n = {claim['n']})"
            told = f"On {place}, this was claimed for {found}"
            if claim.get("others", 0) >= _FEWEST:
                told += f" and, wrongly, for {_percent(claim['wrongly'])} of the others (n = {claim['others']})"
            if claim.get("claimed", 0) >= _FEWEST and "others" in claim:
                had = claim["n"] / (claim["n"] + claim["others"])  # by which the next figure stands and falls
                told += f". Of these claims, {_percent(claim['right'])} were right (n = {claim['claimed']}), "
                told += f"where {had:.0%} of the X-rays were labelled so"
            return " ".join([*unknown, f"{told}.", *self._on_other_findings(name, task, analysis)])
        return "How often these networks are right when they agree on this was not measured."

    def _on_other_findings(self, claim: str, task: Task, analysis: Analysis) -> list[str]:
        """For how many X-rays with a finding that is none of the classes the same networks claim *Normal*."""
        found = self._of("other_findings", task, analysis)
        same = set(found.get("models", ())) == set(analysis.readings_of(task.name))
        if claim != "Normal" or not same or "claimed" not in found or found["n"] < _FEWEST:
            return []
        share, n = _percent(found["claimed"]["Normal"]), found["n"]
        return [
            f"Of test X-rays with another finding, such as a nodule or an effusion, {share} were called so (n = {n})."
        ]

    def on_doubt(self, task: Task, analysis: Analysis) -> str:
        """Why the networks of a task claim no class, a sentence or two: they disagree, or are not sure enough."""
        if analysis.divided_of(task.name):
            group, why = "divided", f"The networks disagree ({_said(task, analysis)})."
            right = "On {} on which they did, most of them were right in {} (n = {})."
        else:
            readings = analysis.readings_of(task.name).values()
            said = ", ".join(f"{reading.probabilities[reading.predicted]:.0%}" for reading in readings)
            (name,), points = analysis.votes_of(task.name), [reading.operating_point for reading in readings]
            needed = " to ".join(f"{point:.0%}" for point in dict.fromkeys((min(points), max(points))))
            alone = len(points) == 1
            who, then = ("The network says", "it was") if alone else (f"All {len(points)} networks say", "they were")
            group = "unsure"
            why = f"{who} {shown_name(name)}, but not surely enough ({said}; a claim needs {needed})."
            right = f"On {{}} on which {then} no surer, {then} right in {{}} (n = {{}})."
        for split, place in _PLACES.items():
            found = self._agreement(task, analysis).get(split, {}).get("groups", {}).get(group)
            if found and found["n"] >= _FEWEST:
                return f"{why} {right.format(place, _percent(found['accuracy']), found['n'])}"
        return why

    def on_heatmaps(self, analysis: Analysis) -> str:
        """A sentence on how much of such heatmaps lies on lesions, and by which explainer most does; "" without any."""
        if not analysis.readings:
            return ""
        told = [self._on_lesions(analysis, *measured) for measured in self._measured("localisation")]
        title = get_explainer(analysis.explainer).title
        return (
            " ".join(filter(None, told))
            or f"Whether heatmaps by {title} lie on lesions was not measured of these networks."
        )

    def _on_lesions(self, analysis: Analysis, lesions: dict, measured_of: set[str]) -> str:
        """The sentence on those networks that one set's figures are of; "" where there is none."""
        known = sorted(set(analysis.readings) & measured_of & set(lesions.get("models", {})))
        measured, title = [lesions["models"][name] for name in known], get_explainer(analysis.explainer).title
        by = {
            name: [figures[name]["enrichment"]["value"] for figures in measured]
            for name in list_explainers()
            if known and all(name in figures for figures in measured)
        }
        if analysis.explainer not in by:
            return ""
        whose = "these networks" if len(known) == len(analysis.readings) else f"{len(known)} of these networks"
        if len(self._sets) > 1 and len(known) == 1 < len(analysis.readings):
            whose = " ".join(titles(known[0])[:2])
        best = max(by, key=lambda name: sum(by[name]))
        most = "" if best == analysis.explainer else f", by {get_explainer(best).title} {_range(by[best])} times"
        return (
            f"On {lesions['n']} X-rays with lesions outlined by radiologists, heatmaps of {whose} by {title} put "
            f"{_range(by[analysis.explainer])} times as much on the lesions as chance would{most}."
        )

    def doubts(self, analysis: Analysis) -> list[str]:
        """Why no class should be named: what `analysis.withheld` says, or why the networks of all tasks claim none."""
        if analysis.withheld:
            return analysis.withheld
        if none_claimed(analysis):
            return [self.on_doubt(get_task(name), analysis) for name in analysis.tasks]
        return []


def none_claimed(analysis: Analysis) -> bool:
    """Whether the networks of every task that was asked disagree or are not sure enough."""
    return bool(analysis.tasks) and all(map(analysis.doubtful_of, analysis.tasks))


def _percent(figure: dict[str, float]) -> str:
    return f"{figure['value']:.0%} ({100 * figure['low']:.0f}–{100 * figure['high']:.0f})"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def summary(analysis: Analysis, claims: Claims) -> str:
    """HTML: for each task what its networks say, and how often that is right elsewhere; "" if `doubts` tells it."""
    if not analysis.readings:
        return '<h2 class="summary">No network was asked; only the lungs were segmented.</h2>'
    if none_claimed(analysis) and not analysis.withheld:
        return ""
    return "".join(_summary(get_task(name), analysis, claims) for name in analysis.tasks)


def _summary(task: Task, analysis: Analysis, claims: Claims) -> str:
    votes, count = analysis.votes_of(task.name), len(analysis.readings_of(task.name))
    title = f"{escape(task.title)}. " if len(analysis.tasks) > 1 else ""
    if not task.exclusive:
        found = ", ".join(f"<b>{escape(shown_name(name))}</b> by {n} of {count}" for name, n in votes.items()) or "none"
        return f'<h2 class="summary">{title}Findings of 50% or more: {found}</h2>'
    if analysis.doubtful_of(task.name):
        doubt = escape(claims.on_doubt(task, analysis))
        return f'<h2 class="summary">{title}<b>No reliable reading</b></h2><p class="evidence">{doubt}</p>'
    (name,) = votes
    start = "Predicted" if count == 1 else f"All {count} networks"
    claim = f'<h2 class="summary">{title}{start}: <b>{escape(shown_name(name))}</b></h2>'
    return f'{claim}<p class="evidence">{escape(claims.on(task, analysis))}</p>'


def claimed(analysis: Analysis) -> str:
    """What the networks say, in a few words without markup."""
    if analysis.withheld or none_claimed(analysis):
        return "No reliable reading"
    claimed = [_said(get_task(name), analysis) for name in analysis.tasks if not analysis.doubtful_of(name)]
    return "; ".join(said or "no finding" for said in claimed)


def _said(task: Task, analysis: Analysis) -> str:
    count = len(analysis.readings_of(task.name))
    return ", ".join(f"{shown_name(name)} by {n} of {count}" for name, n in analysis.votes_of(task.name).items())
