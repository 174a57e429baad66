"""How much needs lung tissue: trainings by one recipe that are shown less, or more, than the lungs."""

import numpy as np

from manet_core.tasks import get_task

from ..recipe import Recipe
from .external import external, rows_of
from .groups import by_group
from .markdown import compared, percent, table
from .statistics import accuracy, bootstrap_weights, confusions, group_means, interval, macro_f1, spread
from .study import NotMeasured, Readings, Study

TITLE = "Controls: what it takes no lung tissue to answer"
TEXT = """\
By one recipe; they differ in what they see (the model card says what else does). Several seeds are averaged, and
intervals resample seeds as well as patients. Points below the network that sees the lungs are what it gains by them."""
SHOWN = {
    "lungs": "the lungs",
    "whole": "the whole picture",
    "outside": "all but the lungs",
    "shape": "the outline of the lungs",
    "shuffled": "the pixels of the lungs in random places",
    "equalised": "the lungs, grey levels equalised",
}
FIGURES = {
    "accuracy": "test accuracy",
    "macro_f1": "macro-F1",
    "class_mean": "test: mean over classes",
    "test_groups": "test: mean over classes and sources",
    "external_groups": "external: mean over classes and sources",
}


def conditions(recipe: Recipe) -> dict:
    """What controls have in common, but for "sees": all settings, and whether they started from other weights."""
    return {"model": recipe.model, "pretrained": recipe.init is not None} | recipe.shared()


def figures(readings: Readings) -> dict[str, tuple[float, np.ndarray]]:
    """{one of `FIGURES`: (value, replicates (R,))} of one training; the same patients are drawn for each training."""
    out = {}
    test = readings.split("test") & readings.labelled
    classes = len(readings.task.classes)
    weights = bootstrap_weights(readings.patients[test])
    pair = readings.truth[test], readings.predicted[test]
    (confusion,) = confusions(*pair, np.ones((1, test.sum())), classes)
    drawn = confusions(*pair, weights, classes)
    out["accuracy"] = accuracy(confusion), accuracy(drawn)
    out["macro_f1"] = macro_f1(confusion), macro_f1(drawn)
    for split in ("test", "external"):
        rows = readings.known(split)
        if rows.any():
            found, means = by_group(readings, rows)
            out[f"{split}_groups"] = found["mean"]["value"], means[:, 0]
            if split == "test":
                out["class_mean"] = found["class_mean"]["value"], means[:, 1]
    return out


def over_seeds(runs: list[tuple[float, np.ndarray]], seed: int) -> tuple[float, np.ndarray]:
    """Mean of one figure over trainings with other seeds, and its replicates, which draw the seeds as well."""
    return float(np.mean([value for value, _ in runs])), spread(np.stack([replicates for _, replicates in runs]), seed)


def needless(blind: tuple, seen: tuple, chance: tuple) -> dict[str, float]:
    """(blind − chance) / (seen − chance) with its interval: the share of a skill that what is hidden does not explain.

    Each is (value, replicates (R,)).
    """
    (b, b_drawn), (s, s_drawn), (c, c_drawn) = blind, seen, chance
    return interval((b - c) / (s - c), (b_drawn - c_drawn) / (s_drawn - c_drawn))


def compare(runs: list[tuple[Recipe, Readings]]) -> dict:
    """What trainings by one recipe come to: {sees: {"settings", "seeds", "n", `FIGURES`, "external", and unless it
    sees the lungs "minus_lungs" and "needs_no_lungs"}}."""
    by_sight: dict[str, list[tuple[Recipe, Readings]]] = {}
    for recipe, readings in runs:
        by_sight.setdefault(recipe.sees, []).append((recipe, readings))
    averaged, out = {}, {}
    for number, (sees, mine) in enumerate(by_sight.items()):
        each = [figures(readings) for _, readings in mine]
        averaged[sees] = {name: over_seeds([run[name] for run in each], number) for name in each[0]}
        test = mine[0][1].split("test") & mine[0][1].labelled
        out[sees] = {
            "settings": conditions(mine[0][0]),
            "seeds": sorted(recipe.seed for recipe, _ in mine),
            "n": int(test.sum()),
            **{name: interval(*figure) for name, figure in averaged[sees].items()},
            "external": _external([readings for _, readings in mine], number),
        }
    if "lungs" not in averaged:
        return out
    chance = {"accuracy": _commonest(by_sight["lungs"][0][1])}
    classes = len(by_sight["lungs"][0][1].task.classes)
    chance["class_mean"] = 1 / classes, np.full(1, 1 / classes)
    for sees, found in averaged.items():
        if sees == "lungs":
            continue
        seen = averaged["lungs"]
        out[sees]["minus_lungs"] = {
            name: interval(value - seen[name][0], drawn - seen[name][1]) for name, (value, drawn) in found.items()
        }
        out[sees]["needs_no_lungs"] = {
            name: needless(found[name], seen[name], by_chance) for name, by_chance in chance.items()
        }
    return out


def _commonest(readings: Readings) -> tuple[float, np.ndarray]:
    """Accuracy of always answering the commonest class of the test split."""
    test = readings.split("test") & readings.labelled
    truth = np.eye(len(readings.task.classes))[readings.truth[test]]
    weights = bootstrap_weights(readings.patients[test])
    return truth.mean(0).max(), (weights @ truth).max(1) / weights.sum(1)


def _external(readings: list[Readings], seed: int) -> dict:
    """`external` of several seeds, each X-ray counted by the share of seeds that are right."""
    found = [external(one) for one in readings]
    out = {}
    for group, parts in found[0].items():
        out[group] = {}
        for part, first in parts.items():
            if len(found) == 1:
                out[group][part] = first
                continue
            figure = over_seeds([_resampled(one, group, part) for one in readings], seed)
            counts = {
                c: round(float(np.mean([one[group][part]["predicted"][c] for one in found])), 1)
                for c in first["predicted"]
            }
            out[group][part] = {"n": first["n"], "sensitivity": interval(*figure), "predicted": counts}
    return out


def _resampled(readings: Readings, group: str, part: str) -> tuple[float, np.ndarray]:
    rows, allowed = rows_of(readings, group, part)
    right = allowed[readings.predicted[rows]].astype(float)
    value, drawn = group_means(right, np.ones((len(right), 1), bool), bootstrap_weights(readings.patients[rows]))
    return float(value[0]), drawn[:, 0]


def measure(study: Study) -> dict:
    """`compare` of the trainings in the folder of controls; those that are not at hand stay as they were recorded."""
    runs = [(recipe, readings) for _, recipe, readings in study.runs(study.controls) if readings.task.exclusive]
    if not runs:
        raise NotMeasured(f"there is no finished training in {study.controls}")
    recipes = {str(sorted((conditions(recipe) | {"sees": ""}).items())) for recipe, _ in runs}
    if len(recipes) > 1:
        raise NotMeasured(f"the trainings in {study.controls} differ in more than what they see and their seeds")
    return compare(runs)


def merged(recorded: dict, found: dict) -> dict:
    """`found`, and those of `recorded` that were trained alike but for what they see: others cannot stand beside it."""

    def of(control: dict) -> dict:
        return control["settings"] | {"sees": ""}

    recipes = [of(control) for control in found.values()]
    return {sees: control for sees, control in recorded.items() if of(control) in recipes} | found


def share_without_lungs(controls: dict) -> str:
    """The share of the accuracy that needs no lung tissue, in a sentence."""
    if not {"lungs", "outside"} <= controls.keys():
        return "Share of the accuracy that needs no lung tissue: not measured."
    seen, blind = (100 * controls[sees]["accuracy"]["value"] for sees in ("lungs", "outside"))
    said = f"{blind:.1f} with the lungs blacked out, {seen:.1f} with the lungs shown"
    if (share := controls["outside"].get("needs_no_lungs")) is None:
        return f"Accuracy, %: {said}; the share above chance that needs no lung tissue was not measured."
    classes = len(get_task(controls["lungs"]["settings"].get("task", "manet")).classes)
    return (
        f"**Share of the accuracy above chance that needs no lung tissue, %: {percent(share['accuracy'])}** "
        f"({said}; chance is to answer the commonest class). Of the mean over classes, where chance is one in "
        f"{classes}: {percent(share['class_mean'])}."
    )


def lines(evidence: dict) -> list[str]:
    """Test and external figures of each, and the points that seeing the lungs adds."""
    controls = evidence["controls"]
    runs = [
        (f"{SHOWN[sees]}{_seeds(run)}", run["settings"]["model"], run, run["external"])
        for sees, run in controls.items()
    ]
    out = [TEXT, "", *compared("what it sees", runs)]
    measured = [name for name in FIGURES if any(name in run for run in controls.values())]
    rows = [
        [f"{SHOWN[sees]}{_seeds(run)}", *(percent(run[name]) if name in run else "" for name in measured)]
        for sees, run in controls.items()
    ]
    for sees, run in controls.items():
        if gained := run.get("minus_lungs"):
            cells = [percent(gained[name]) if name in gained else "" for name in measured]
            rows.append([f"**{SHOWN[sees]} − the lungs**, points", *cells])
    out += table(["what it sees", *(FIGURES[name] for name in measured)], rows)
    return [*out, share_without_lungs(controls), ""]


def _seeds(run: dict) -> str:
    return f", {len(run['seeds'])} seeds" if len(run["seeds"]) > 1 else ""
