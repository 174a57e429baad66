"""Trainings by other recipes, beside each other."""

from ..recipe import Recipe
from ..tables import describe
from .classification import read_rows
from .external import external
from .groups import by_group
from .markdown import compared
from .study import NotMeasured, Study

TITLE = "Recipes"
TEXT = "Does another recipe do better on external X-rays? The mean is that of the three columns before it."


def measure(study: Study) -> dict:
    """{name of its folder: settings and figures} of each training that is at hand; others stay as recorded."""
    out = {}
    for name, recipe, readings in study.runs(study.recipes):
        if not readings.task.exclusive:
            continue
        test = readings.split("test") & readings.labelled
        out[name] = {
            "settings": {"model": recipe.model} | recipe.shared(),
            **read_rows(readings, test),
            "groups": by_group(readings, readings.known("test"))[0]["mean"],
            "external": external(readings),
        }
    if not out:
        raise NotMeasured(f"there is no finished training in {study.recipes}")
    return out


def lines(evidence: dict) -> list[str]:
    """One row a training, the paper's recipe first."""
    runs = []
    for _, run in sorted(evidence["recipes"].items(), key=lambda item: item[0] != "paper"):
        recipe = Recipe.of(run["settings"])
        shown = "" if recipe.sees == "lungs" else f", sees {recipe.sees}"
        runs.append((describe(recipe) + shown, run["settings"]["model"], run, run["external"]))
    return [TEXT, "", *compared("recipe", runs)]
