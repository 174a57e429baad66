"""What a set of finished trainings says: the paper's tables, and a verdict on each of its claims.

Nothing here trains or reads pictures. A run is a dictionary as `train.paper`
gathers it: split, model, trial, recipe (a `Recipe`), predicted (N,) and labels
(N,) as class numbers, patients (N,), and accuracy on val by epoch, empty where
it is not known.
"""

import numpy as np
import pandas as pd
from sklearn.metrics import classification_report, confusion_matrix

from manet_core import CLASSES, list_models
from manet_core.networks.registry import split_name

from .measures.markdown import percent
from .measures.segmentation import read_masks
from .measures.statistics import interval, mean_over_trials, spread
from .recipe import Recipe

# MANet, Table 2: mean test accuracy of three trials, %
PAPER_ACCURACY = {
    "resnet34": 95.78, "resnet34_ma": 96.03, "resnet34_cbam": 94.92,
    "resnet50": 96.08, "resnet50_ma": 96.32, "resnet50_cbam": 95.59,
    "vgg16": 93.87, "vgg16_ma": 95.10, "inception_v3": 95.39, "inception_v3_ma": 96.03,
}  # fmt: skip

SPLITS = {"patient": "split by patient", "image": "split by image"}

TRIALS = 3  # with fewer, a verdict would rest on the luck of the seeds
SHORTEST = 3  # epochs below which a training proves that a network learns, and says nothing of how well or how fast

# MANet, section 4: test IoU of the lung masks, %
PAPER_IOU = {"Normal": 93.49, "Tuberculosis": 93.14, "COVID-19": 89.07, "all": 92.50}


# --- measures of a training curve -----------------------------------------------------------------------------------


def fluctuation(accuracy: np.ndarray) -> float:
    """Standard deviation of the epoch-to-epoch change of validation accuracy (E,) in the last half; NaN below E = 6."""
    change = np.diff(accuracy[len(accuracy) // 2 :])
    return float(change.std()) if len(accuracy) >= 6 else float("nan")


def epochs_to(accuracy: np.ndarray, target: float) -> int:
    """The first epoch, counted from 1, whose validation accuracy (E,) reaches `target`."""
    return int(np.argmax(accuracy >= target)) + 1


# --- from runs to results -------------------------------------------------------------------------------------------


def correct(run: dict) -> np.ndarray:
    """Which test X-rays (N,) a run classified as labelled: float, 0 or 1."""
    return (run["predicted"] == run["labels"]).astype(float)


def conditions(recipe: Recipe) -> dict:
    """What two trainings must have in common for a difference to be their networks': all settings, and the start."""
    return recipe.shared() | {"init": recipe.init}


def pairs_of(of: list[dict], to: list[dict]) -> list[tuple[dict, dict]]:
    """Runs of two networks that share conditions and seed; of several recipes, those of the one with the most pairs."""
    found = []
    for a in of:
        found += [(a, b) for b in to if a["trial"] == b["trial"] and conditions(a["recipe"]) == conditions(b["recipe"])]
    groups = [[pair for pair in found if conditions(pair[0]["recipe"]) == conditions(a["recipe"])] for a, _ in found]
    return max(groups, key=len, default=[])


def difference(pairs: list[tuple[dict, dict]]) -> dict | None:
    """Accuracy of a network minus that of another, paired by seed and by X-ray; None without a pair.

    The interval resamples patients and, where there are several, trials.
    """
    if not pairs:
        return None
    rows = np.array([correct(a) - correct(b) for a, b in pairs])
    return mean_over_trials(rows, pairs[0][0]["patients"]) | {"epochs": pairs[0][0]["recipe"].epochs}


def summarise(runs: list[dict], indices: dict[str, pd.DataFrame], trials: int) -> dict:
    """Tables 1, 2, 4 and 5 for each split, and what Fig. 10 shows as numbers."""
    recipes = []
    for run in runs:
        if conditions(run["recipe"]) not in recipes:
            recipes.append(conditions(run["recipe"]))
    out = {"trials_wanted": trials, "recipes": recipes, "splits": {}}
    for split in dict.fromkeys(run["split"] for run in runs):
        here = [run for run in runs if run["split"] == split]
        index = indices[split]
        index = index[index.split.isin(["train", "val", "test"]) & index.label.isin(CLASSES)]
        models = {}
        for name in (name for name in list_models() if any(run["model"] == name for run in here)):
            mine = [run for run in here if run["model"] == name]
            plain = [run for run in here if run["model"] == split_name(name)[0]]
            accuracies = {run["trial"]: float(correct(run).mean()) for run in mine}
            curves = {str(run["trial"]): np.array(run["accuracy"]) for run in mine}
            models[name] = {
                "accuracy": {str(trial): value for trial, value in accuracies.items()},
                "mean": float(np.mean(list(accuracies.values()))),
                "minus_plain": None if name == split_name(name)[0] else difference(pairs_of(mine, plain)),
                "complete": len(mine) >= trials,
                "recipe": {str(run["trial"]): recipes.index(conditions(run["recipe"])) for run in mine},
                "fluctuation": {
                    trial: value for trial, curve in curves.items() if np.isfinite(value := fluctuation(curve))
                },
                "curve": {trial: curve.tolist() for trial, curve in curves.items()},
            }
        best = max(here, key=lambda run: max(run["accuracy"], default=0.0))  # on validation
        out["splits"][split] = {
            "pictures": {
                label: {s: int(((index.label == label) & (index.split == s)).sum()) for s in ("train", "val", "test")}
                for label in CLASSES
            },
            "patients_in_train_and_test": len(
                set(index.patient[index.split == "train"]) & set(index.patient[index.split == "test"])
            ),
            "models": models,
            "best": {
                "model": best["model"],
                "trial": best["trial"],
                "report": classification_report(
                    best["labels"], best["predicted"], labels=range(len(CLASSES)), target_names=CLASSES,
                    output_dict=True, zero_division=0,
                ),
                "confusion": confusion_matrix(best["labels"], best["predicted"], labels=range(len(CLASSES))).tolist(),
            },
        }  # fmt: skip
    return out


def segmentation(masks: pd.DataFrame) -> dict:
    """IoU by class, by source and of all, from `measure_masks`."""
    groups = {label: masks[masks.label == label] for label in CLASSES}
    groups |= {f"source {source}": masks[masks.source == source] for source in sorted(masks.source.unique())}
    groups["all"] = masks
    return {name: read_masks(rows) for name, rows in groups.items() if len(rows)}


# --- verdicts -------------------------------------------------------------------------------------------------------


def _pairs(models: dict, a: str, b: str, measure) -> list[float]:
    """measure(curve of a, curve of b) of pairs of equal recipe and seed, of backbones that have `TRIALS` of them."""
    found = []
    for name, mine in models.items():
        backbone, attention = split_name(name)
        theirs = models.get(f"{backbone}_{b}".rstrip("_"))
        if attention != a or theirs is None:
            continue
        for recipe in sorted(set(mine["recipe"].values())):
            trials = [t for t, r in mine["recipe"].items() if r == recipe == theirs["recipe"].get(t)]
            values = [measure(np.array(mine["curve"][t]), np.array(theirs["curve"][t])) for t in trials]
            values = [float(value) for value in values if np.isfinite(value)]
            found += values if len(values) >= TRIALS else []
    return found


def _over_pairs(values: list[float]) -> dict | None:
    """Mean and bootstrap interval over training pairs; None without any."""
    if not values:
        return None
    drawn = spread(np.repeat(np.array(values)[:, None], 2000, axis=1))
    return interval(float(np.mean(values)), drawn) | {"pairs": len(values)}


def _judge(figure: dict | None, wanted: str) -> str:
    """ "supported", "contradicted" or "not supported here", where the figure should be "above" or "below" zero."""
    if figure is None:
        return "not enough runs"
    low, high = (figure["low"], figure["high"]) if wanted == "above" else (-figure["high"], -figure["low"])
    return "supported" if low > 0 else "contradicted" if high < 0 else "not supported here"


def verdicts(results: dict) -> list[dict]:
    """The paper's five claims: {"split", "claim", "measure", "figure", "verdict"}, computed, never written by hand.

    Only trainings of equal recipe and seed are compared, and only where there are `TRIALS` such pairs. Of trainings of
    fewer than `SHORTEST` epochs only the cost counts.
    """
    out = []
    for split, part in results["splits"].items():
        models = part["models"]

        def gains(attention, models=models):
            own = [m["minus_plain"] for name, m in models.items() if split_name(name)[1] == attention]
            return [g for g in own if g is not None and g["trials"] >= TRIALS and g["epochs"] >= SHORTEST]

        def average(found):
            if not found:
                return None
            keys = ("value", "low", "high")  # the mean of the ends is wider than the interval of the mean: cautious
            return {key: float(np.mean([g[key] for g in found])) for key in keys} | {"backbones": len(found)}

        ma, cbam = average(gains("ma")), average(gains("cbam"))
        stable = _over_pairs(_pairs(models, "ma", "", lambda a, b: fluctuation(a) - fluctuation(b)))

        def lead(a, b):
            if min(len(a), len(b)) < SHORTEST:
                return float("nan")
            target = 0.95 * min(a.max(), b.max())
            return epochs_to(a, target) - epochs_to(b, target)

        fast = _over_pairs(_pairs(models, "ma", "cbam", lead))
        out += [
            dict(split=split, claim="MA beats plain", measure="test accuracy, MA − plain, mean over backbones",
                 figure=ma, verdict=_judge(ma, "above")),
            dict(split=split, claim="MA trains more stably than plain",
                 measure="fluctuation of validation accuracy, MA − plain", figure=stable,
                 verdict=_judge(stable, "below")),
            dict(split=split, claim="MA converges faster than CBAM",
                 measure="epochs to 95 % of what both reach, MA − CBAM", figure=fast, verdict=_judge(fast, "below")),
            dict(split=split, claim="CBAM does not beat plain",
                 measure="test accuracy, CBAM − plain, mean over backbones", figure=cbam,
                 verdict=_judge(cbam, "below")),
        ]  # fmt: skip
    ratios = [cost["training_step_ratio"] for cost in results["costs"].values() if "training_step_ratio" in cost]
    cost = {"value": float(np.mean(ratios)), "low": min(ratios), "high": max(ratios)} if ratios else None
    verdict = "not enough runs" if cost is None else "supported" if cost["high"] <= 1.2155 else "contradicted"
    measure = "training step, MA / plain: mean, lowest and highest of the backbones; the paper's highest is 1.2155"
    return [*out, dict(split="any", claim="MA costs little", measure=measure, figure=cost, verdict=verdict)]


# --- Markdown -------------------------------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows] + [""]


def _points(figure: dict | None) -> str:
    return "" if figure is None else percent(figure)


def describe(recipe: Recipe) -> str:
    """A recipe in words: what every training has, and what else departs from the paper's."""
    start = recipe.init or ("ImageNet" if recipe.imagenet else "random")
    words = [
        f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}", f"{recipe.size} px", f"batch {recipe.batch}",
        f"{recipe.optimizer} lr {recipe.lr:g}", f"weight decay {recipe.weight_decay:g}", recipe.schedule,
        f"start: {start}",
    ]  # fmt: skip
    said = ("epochs", "size", "batch", "optimizer", "lr", "weight_decay", "schedule", "init", "imagenet", "sees")
    for setting, values in recipe.departures().items():
        here = f"{values['here']:g}" if isinstance(values["here"], float) else values["here"]
        if setting not in said:
            words.append(f"{here} augmentation" if setting == "augment" else f"{setting.replace('_', ' ')} {here}")
    if recipe.sees != "lungs":
        words.append("lungs equalised" if recipe.sees == "equalised" else f"CONTROL: input is {recipe.sees}")
    return ", ".join(words)


def claims(results: dict) -> str:
    """The verdicts as a table."""
    rows = []
    for v in results["verdicts"]:
        f, scale = v["figure"], 1 if "epochs to" in v["measure"] or "/" in v["measure"] else 100
        figure = "" if f is None else f"{scale * f['value']:.3g} ({scale * f['low']:.3g} to {scale * f['high']:.3g})"
        rows.append([v["claim"], SPLITS.get(v["split"], ""), v["measure"], figure, f"**{v['verdict']}**"])
    return "\n".join(_table(["claim", "", "measure", "figure", "verdict"], rows))


def markdown(results: dict) -> str:
    """All tables as one Markdown page."""
    lines = ["# The paper's experiment on the data at hand", ""]
    lines += ["Written by `python -m train.paper`. Intervals are 95 % bootstrap over patients and, where there are", ""]
    lines[-1:] = ["several, over trials.", ""]
    lines += ["## Table 1: pictures in each set", ""]
    rows = []
    for split, part in results["splits"].items():
        for label, n in part["pictures"].items():
            rows.append([SPLITS[split], label, n["train"], n["val"], n["test"]])
    lines += _table(["", "class", "train", "validation", "test"], rows)
    for split, part in results["splits"].items():
        lines.append(f"* {SPLITS[split]}: {part['patients_in_train_and_test']} patients are in both train and test")

    lines += ["", "## Table 2: accuracy, %", ""]
    rows, marks = [], {}
    spoken = [describe(Recipe.of(recipe)) for recipe in results["recipes"]]
    for split, part in results["splits"].items():
        for name, m in part["models"].items():
            used = [marks.setdefault(spoken[r], chr(97 + len(marks))) for r in dict.fromkeys(m["recipe"].values())]
            paper = PAPER_ACCURACY.get(name)
            trials = ", ".join(f"{100 * value:.2f}" for value in m["accuracy"].values())
            state = f"{len(m['accuracy'])} of {results['trials_wanted']}"
            best = [100 * max(curve) for curve in m["curve"].values() if curve]
            validation = f"{np.mean(best):.1f}" if best else "–"
            rows.append([
                f"`{name}`", SPLITS[split], validation, trials, f"{100 * m['mean']:.2f}", paper or "–",
                _points(m["minus_plain"]), state, ", ".join(used),
            ])  # fmt: skip
    head = ["model", "", "validation, best epoch", "test, by trial", "mean", "paper", "− plain, points (95 % CI)"]
    head += ["trials done", "recipe"]
    lines += _table(head, rows)
    lines += [f"* recipe {mark}: {text}" for text, mark in marks.items()]
    lines.append(
        "* − plain: trainings of equal recipe, start and seed only; with one trial the interval leaves out how much "
        "seeds differ"
    )
    lines.append(
        f"* verdicts count differences of at least {TRIALS} trials and {SHORTEST} epochs; shorter trainings only show "
        "that a network learns"
    )
    for split, part in results["splits"].items():
        counts = pd.DataFrame(part["pictures"]).T
        most = 100 * counts.max() / counts.sum()
        lines.append(
            f"* {SPLITS[split]}: a network that always answers the most frequent class has an accuracy of "
            f"{most.val:.1f} % on validation and {most.test:.1f} % on test"
        )
    if len(results["splits"]) == 2:
        patient, image = (results["splits"][s]["models"] for s in ("patient", "image"))
        both = [name for name in patient if name in image]
        if both:
            gap = np.mean([image[name]["mean"] - patient[name]["mean"] for name in both])
            lines.append(f"* split by image − split by patient: {100 * gap:+.2f} points, mean of {len(both)} networks")

    lines += ["", "## Table 3: cost", ""]
    rows = []
    for name, c in results["costs"].items():
        timed = [f"{c[key]:.1f}" if key in c else "–" for key in ("training_step_ms", "inference_ms")]
        ratio = [f"{c[key]:.3f}" if key in c else "" for key in ("training_step_ratio", "inference_ratio")]
        counted = [f"{c['parameters'] / 1e6:.2f}", f"{c['flops'] / 1e6:.2f}", c["map_elements"] or ""]
        left = f"{c['last_map']:.2g}" if "last_map" in c else ""
        rows.append([f"`{name}`", *counted, c["size"], *timed, *ratio, left])
    head = ["model", "parameters, M", "FLOPs at 512 px, M", "map elements"]
    head += ["trained at, px", "training step of 16, ms", "inference, ms", "step / plain", "inference / plain"]
    lines += _table([*head, "last map"], rows)
    lines += ["Timed at the size that was trained. Last map: the highest value of mask attention's last map for a mask"]
    lines += ["that is all lung. Padding lowers it, most in small pictures: see `complexity.last_map`.", ""]

    for split, part in results["splits"].items():
        best, report = part["best"], part["best"]["report"]
        title = f"`{best['model']}`, trial {best['trial']}, the best on validation, {SPLITS[split]}"
        lines += [f"## Table 4: {title}", ""]
        rows = [
            [label, *(f"{100 * report[label][key]:.1f}" for key in ("precision", "recall", "f1-score")),
             int(report[label]["support"])]
            for label in (*CLASSES, "macro avg")
        ]  # fmt: skip
        lines += _table(["class", "precision, %", "recall, %", "F1, %", "n"], rows)
        lines += [f"## Table 5: {title}", ""]
        lines += _table(["label ↓, predicted →", *CLASSES], [[c, *row] for c, row in zip(CLASSES, best["confusion"])])

    lines += ["## Lung masks: IoU, %", ""]
    rows = [[name, percent(r["iou"]), PAPER_IOU.get(name, "–"), r["n"]] for name, r in results["segmentation"].items()]
    lines += _table(["", "IoU (95 % CI)", "paper", "n"], rows)

    lines += ["## Fig. 10: stability of training", ""]
    rows = []
    for split, part in results["splits"].items():
        for name, m in part["models"].items():
            values = list(m["fluctuation"].values())
            rows.append([f"`{name}`", SPLITS[split], f"{100 * np.mean(values):.2f}" if values else "too few epochs"])
    lines += _table(["model", "", "fluctuation in the last half, points"], rows)

    return "\n".join([*lines, "## The paper's claims", "", claims(results)])
