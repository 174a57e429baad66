"""How much of it is true? What a critic would ask of the shipped weights, answered with numbers.

    python -m train.evidence --data DATA

writes results/evidence.json, evidence.md and reliability.png: accuracy on other
hospitals' X-rays, what networks score without any lung tissue, whether their
features know the source, how calibrated they are, where their heatmaps lie and
whether those places matter, what disturbs them, whether they notice a picture
that is none of theirs, and whether a patient or a picture is in two splits.
Intervals are 95 % bootstrap over patients, and exact binomial where all or none
of the X-rays are right.

Controls and other recipes are trainings of their own, found in the folders
`--controls` and `--recipes`; for the shipped page, with $recipe being
`--imagenet --size 128 --epochs 3 --batch 32 --optimizer adamw --lr 1e-3
--weight-decay 0.05 --schedule onecycle`:

    for sees in lungs whole outside shape shuffled; do
      python -m train.classify --model efficientnet_lite0 --sees $sees --out runs/controls/$sees $recipe
    done
    python -m train.classify --model efficientnet_lite0_ma --out runs/recipes/paper $recipe
    python -m train.classify --model efficientnet_lite0_ma --out runs/recipes/robust $recipe \\
        --augment robust --balance 0.5
    python -m train.classify --model efficientnet_lite0_ma --out runs/recipes/equalised $recipe --sees equalised
    for augment in style masks; do
      python -m train.classify --model efficientnet_lite0_ma --out runs/recipes/$augment $recipe --augment $augment
    done

The figures of those that are not at hand stay as they were recorded.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from manet_core import CLASSES, create_classifier, list_models
from manet_core.weights import fingerprint, load_network, read_manifest, write_manifest

from . import attention_study, familiarity, robustness
from .calibration import calibration, fit_temperature
from .data import LungPictures, Pictures, predicted_lungs
from .duplicates import crossing_patients, near_duplicates
from .evaluate import bootstrap_weights, interval, options, percent, read_test, write_between
from .figures import reliability
from .refit import last_layer, read_out
from .tables import RECIPE, describe

# what other hospitals' X-rays show, and which answers count as right
EXTERNAL = {
    "COVID-19": (["COVID-19"], ["COVID-19"]),
    "tuberculosis": (["Tuberculosis"], ["Tuberculosis"]),
    "adult normals": (["Normal"], ["Normal"]),
    "adult pneumonia": (
        ["Bacterial pneumonia", "Viral pneumonia", "Pneumonia (unspecified)"],
        ["Bacterial pneumonia", "Viral pneumonia"],
    ),
}

SECTIONS = ["strangers", "models", "controls", "recipes", "heatmaps", "disturbances", "splits"]

INTERVALS = """\
Written by `python -m train.evidence`. Intervals are 95 % bootstrap over patients; where all or none are right, which
resampling cannot doubt, exact binomial."""

BY_CLASS = """\
Accuracy and macro-F1, % (95 % CI); of each class sensitivity and specificity, %, and AUROC against the rest. The other
hospitals' X-rays are taken together here, without adult pneumonia that is neither called bacterial nor viral."""

LAST_LAYER = """\
As trained, and as shipped: the same weights, but the last layer fitted again on the frozen features with each class of
each source weighing the same, and each class's logit lowered by the margin that 95 % of the class's own validation
X-rays have to spare over every other class (`python -m train.refit`). A layer that costs more than a point of accuracy
on validation is not taken. No X-ray of another hospital was fitted to or chose between these; but what was tried at
all, and how strongly, is due to what they had shown, so expect a little less of others."""

HEATMAP_MEASURES = """\
In lung: share of the heatmap inside the mask; mask attention silences features outside, so its share is high by
construction. Spread: entropy, 1 for an even map. Deletion and insertion: what the network's own heatmap gains over that
of another X-ray when lung tissue is covered, or uncovered, hottest first; above 0, it points at what the network uses.
As random: correlation with the heatmap of the same architecture with random weights."""

STRANGERS = """\
The distance of a picture's segmenter features from those of the training X-rays, against our test split. The page warns
above a limit; other hospitals' X-rays are chest X-rays, but not of the kind that the networks know."""


def share(right: np.ndarray, patients: np.ndarray) -> dict:
    """Share of X-rays that are `right` (N,) bool, with its interval.

    Resampling tells nothing where all or none are right; there it is the exact binomial interval over patients.
    """
    right = right.astype(float)
    if 0 < right.mean() < 1:
        weights = bootstrap_weights(patients)
        return interval(right.mean(), weights @ right / weights.sum(1))
    n = len(np.unique(patients))
    bounds = binomtest(n * int(right[0]), n).proportion_ci()
    return {"value": right.mean(), "low": bounds.low, "high": bounds.high}


def external(probabilities: np.ndarray, index) -> dict:
    """Share of X-rays called right in each external group and in each of its sources; `index` has the same rows."""
    called = np.array(CLASSES)[probabilities.argmax(1)]
    out = {}
    for group, (labels, answers) in EXTERNAL.items():
        at = (index.split == "external") & index.label.isin(labels)
        if not at.any():
            continue
        parts = {"all": at} | {s: at & (index.source == s) for s in sorted(index.source[at].unique())}
        out[group] = {}
        for part, rows in parts.items():
            rows = rows.to_numpy()
            out[group][part] = {
                "n": int(rows.sum()),
                "right": share(np.isin(called[rows], answers), index.patient.to_numpy()[rows]),
                "called": {name: int((called[rows] == name).sum()) for name in CLASSES},
            }
    return out


def probe(features: np.ndarray, target: np.ndarray, patients: np.ndarray) -> dict:
    """How well a linear probe reads `target` (N,) off frozen features (N, C): balanced accuracy, chance beside it.

    Five-fold cross-validation; no patient is in two folds.
    """
    folds = GroupKFold(min(5, len(np.unique(patients))))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500, class_weight="balanced"))
    predicted = cross_val_predict(model, features, target, groups=patients, cv=folds)
    weights = bootstrap_weights(patients, 200)
    kinds = np.unique(target)
    with np.errstate(invalid="ignore"):  # a draw may lack a kind; its figure is then no number, and left out
        recalls = [
            (weights[:, target == k] @ (predicted[target == k] == k)) / weights[:, target == k].sum(1) for k in kinds
        ]
    drawn = np.mean(recalls, axis=0)
    value = balanced_accuracy_score(target, predicted)
    counts = {str(k): int((target == k).sum()) for k in kinds}
    return {"balanced_accuracy": interval(value, drawn), "chance": 1 / len(kinds), "n": counts}


def study(args: argparse.Namespace, name: str, entry: dict) -> tuple[dict, np.ndarray]:
    """All that is measured of one shipped classifier by reading X-rays once; and its probabilities on test."""
    pictures = Pictures(args.data, entry["preprocessing"]["size"], args.cache)
    rows = pictures.rows("val", "test", "external")
    index = pictures.index.iloc[rows].reset_index(drop=True)
    dataset = LungPictures("classify", pictures, rows, predicted_lungs(pictures, args.weights, rows))
    logits, features = read_out(load_network(args.weights, name, args.device), dataset, name)
    labels = dataset.labels
    val, test, other = (((index.split == s) & (labels >= 0)).to_numpy() for s in ("val", "test", "external"))
    temperature = fit_temperature(logits[val], labels[val])
    probabilities = softmax(logits / temperature, 1)
    truth = labels[test]
    patients = index.patient.to_numpy()

    _, layer = last_layer(load_network(args.weights, name, refitted=False))
    as_trained = layer(torch.from_numpy(features)).softmax(1).numpy()

    per_source = {}
    for source in sorted(index.source[test].unique()):
        here = test & (index.source == source).to_numpy()
        weights = bootstrap_weights(patients[here])
        per_source[source] = read_test(probabilities[here], labels[here], weights)
    normal = (index.label == "Normal").to_numpy()
    ours = test | val
    out = {
        "sha256": fingerprint(entry),
        "test": read_test(probabilities[test], truth, bootstrap_weights(patients[test])),
        "test_by_source": per_source,
        "external": external(probabilities, index),
        "external_pooled": read_test(probabilities[other], labels[other], bootstrap_weights(patients[other])),
        "last_layer": entry.get("last_layer"),
        "as_trained": {
            **read_test(as_trained[test], truth, bootstrap_weights(patients[test])),
            "external": external(as_trained, index),
        },
        "calibration": {
            "temperature": temperature,
            "test": calibration(logits[test], truth, temperature),
            "external": calibration(logits[other], labels[other], temperature),
        },
        "source_probe": {
            "all classes, our three carriers": probe(
                features[ours], index.source[ours].replace("montgomery", "shenzhen").to_numpy(), patients[ours]
            ),
            "normals only, all sources": probe(
                features[normal], index.source[normal].to_numpy(), patients[normal]
            ),
        },
    }  # fmt: skip
    return out, probabilities[test]


def studies(args: argparse.Namespace, entries: dict[str, dict]) -> tuple[dict, dict]:
    """`study` of every network, and their `agreement`."""
    found, probabilities = {}, {}
    for name, entry in entries.items():
        found[name], probabilities[name] = study(args, name, entry)
    pictures = Pictures(args.data, 224, args.cache)
    rows = pictures.rows("test", labelled=True)
    patients = pictures.index.patient.to_numpy()[rows]
    return found, agreement(probabilities, pictures.labels(rows), patients)


def agreement(probabilities: dict[str, np.ndarray], truth: np.ndarray, patients: np.ndarray) -> dict:
    """How accurate the majority is on all X-rays, on those on which all networks agree, and on the rest."""
    called = np.stack([p.argmax(1) for p in probabilities.values()])
    votes = np.stack([(called == k).sum(0) for k in range(len(CLASSES))])
    right, same = votes.argmax(0) == truth, votes.max(0) == len(called)
    groups = {}
    for name, rows in (("all", np.ones(len(truth), bool)), ("unanimous", same), ("divided", ~same)):
        if rows.any():
            groups[name] = {"n": int(rows.sum()), "accuracy": share(right[rows], patients[rows])}
    return {"models": list(probabilities), "share_unanimous": float(same.mean()), "groups": groups}


def trainings(args: argparse.Namespace, folder: Path) -> dict:
    """{name: settings and figures} of each finished training in `folder`, on test and on other hospitals' X-rays."""
    out = {}
    for run in sorted(path.parent for path in folder.glob("*/result.json")):
        settings = json.loads((run / "result.json").read_text())["settings"]
        pictures = Pictures(args.data, settings["size"], args.cache)
        rows = pictures.rows("test", "external")
        index = pictures.index.iloc[rows].reset_index(drop=True)
        lungs = predicted_lungs(pictures, args.weights, rows)
        dataset = LungPictures("classify", pictures, rows, lungs, sees=settings.get("sees", "lungs"))
        net = create_classifier(settings["model"]).eval()
        net.load_state_dict(load_file(run / "best.safetensors"))
        logits, _ = read_out(net.to(args.device), dataset, run.name)
        probabilities = softmax(logits, 1)
        test = ((index.split == "test") & (dataset.labels >= 0)).to_numpy()
        weights = bootstrap_weights(index.patient.to_numpy()[test])
        out[run.name] = {
            "settings": {option: settings.get(option) for option in ("model", *RECIPE)},
            **read_test(probabilities[test], dataset.labels[test], weights),
            "external": external(probabilities, index),
        }
    return out


def splits(args: argparse.Namespace) -> dict:
    """Patients and near-duplicates that cross the splits."""
    pictures = Pictures(args.data, 224, args.cache)
    pairs = near_duplicates(pictures.images, pictures.index, bits=6)
    split, label = pictures.index.split.to_numpy(), pictures.index.label.to_numpy()
    kinds = [" – ".join(sorted((split[a], split[b]))) for a, b in zip(pairs.a, pairs.b)]
    return {
        "patients_crossing": len(crossing_patients(pictures.index)),
        "near_duplicates": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "of_another_label": int(sum(label[a] != label[b] for a, b in zip(pairs.a, pairs.b))),
        "pictures": len(pictures.index),
    }


def heatmaps(args: argparse.Namespace, entries: dict) -> dict:
    """`attention_study.measure` on an even sample of the test split, as means with intervals and paired differences."""
    names = list(entries)
    nets = {name: load_network(args.weights, name, args.device) for name in names}
    torch.manual_seed(0)
    randomised = {name: create_classifier(name).eval().to(args.device) for name in names}
    pictures = Pictures(args.data, entries[names[0]]["preprocessing"]["size"], args.cache)
    rows = pictures.rows("test", labelled=True)
    dataset = LungPictures("classify", pictures, rows, predicted_lungs(pictures, args.weights, rows))
    each = max(1, args.heatmaps // len(CLASSES))
    items = np.concatenate([np.flatnonzero(dataset.labels == k)[:each] for k in range(len(CLASSES))])
    measured = attention_study.measure(nets, randomised, dataset, np.random.default_rng(0).permutation(items))
    weights = np.random.default_rng(0).multinomial(len(items), np.full(len(items), 1 / len(items)), 2000)

    def mean(values: np.ndarray) -> dict:
        known = np.isfinite(values)
        drawn = weights[:, known] @ values[known] / np.maximum(weights[:, known].sum(1), 1)
        return interval(values[known].mean(), drawn) if known.any() else interval(np.nan, np.full(2, np.nan))

    out = {"n": len(items), "agreement": {pair: mean(v) for pair, v in measured.pop("agreement").items()}, "models": {}}
    for name, values in measured.items():
        plain = name.removesuffix("_ma").removesuffix("_cbam")
        out["models"][name] = {measure: mean(v) for measure, v in values.items()}
        if name != plain and plain in measured:
            out["models"][name]["minus plain"] = {m: mean(v - measured[plain][m]) for m, v in values.items()}
    return out


def disturbances(args: argparse.Namespace, entries: dict) -> dict:
    """Accuracy of each network on a random sample of the test split under each of `robustness.CHANGES`.

    {"n", "changes": {change: {network: accuracy, and "minus none", the change of the same X-rays' accuracy}}}
    """
    size = next(iter(entries.values()))["preprocessing"]["size"]
    nets = {name: load_network(args.weights, name, args.device) for name in entries}
    segmenter = load_network(args.weights, "resunet", args.device)
    pictures = Pictures(args.data, size, args.cache)
    rows = pictures.rows("test", labelled=True)
    rows = np.sort(np.random.default_rng(0).permutation(rows)[: args.disturbed])
    weights = bootstrap_weights(pictures.index.patient.to_numpy()[rows])
    mask_size = read_manifest(args.weights)["resunet"]["preprocessing"]["size"]
    out, undisturbed = {}, {}

    def mean(values: np.ndarray) -> dict:
        return interval(values.mean(), weights @ values / weights.sum(1))

    for name, change in tqdm(robustness.CHANGES.items(), "changes"):
        right = robustness.accuracy_under(
            change, pictures.images[rows], pictures.labels(rows), segmenter, mask_size, nets
        )
        right = {net: values.astype(float) for net, values in right.items()}
        undisturbed = undisturbed or right
        out[name] = {net: mean(r) | {"minus none": mean(r - undisturbed[net])} for net, r in right.items()}
    return {"n": len(rows), "changes": out}


def markdown(evidence: dict) -> str:
    """The evidence as one page of tables."""

    def table(head: list, rows: list) -> list[str]:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]

    def compared(what: str, runs: list[tuple[str, str, dict, dict]]) -> list[str]:
        """A table of (label, network, test figures, figures of other hospitals)."""
        if not runs:
            return ["None of these is trained; `python -m train.evidence --help` says how.", ""]
        groups, rows = ("COVID-19", "tuberculosis", "adult normals"), []
        for label, network, test, elsewhere in runs:
            figures = [elsewhere[group]["all"]["right"] for group in groups]
            mean = f"{100 * np.mean([figure['value'] for figure in figures]):.1f}"
            rows.append([label, f"`{network}`", percent(test["accuracy"]), *map(percent, figures), mean])
        return table([what, "network", "test accuracy", *(f"other: {group}" for group in groups), "mean"], rows)

    models = evidence["models"]
    names = [f"`{name}`" for name in models]
    lines = ["# Is it true?", "", INTERVALS, "", "## By class", "", BY_CLASS, ""]
    rows = []
    for where, key in (("our test split", "test"), ("other hospitals", "external_pooled")):
        found = [m[key] for m in models.values()]
        rows.append([f"**{where}: accuracy**", found[0]["n"], *(percent(f["accuracy"]) for f in found)])
        rows.append([f"{where}: macro-F1", found[0]["n"], *(percent(f["macro_f1"]) for f in found)])
        for label, figures in found[0]["per_class"].items():
            of_class = [f["per_class"][label] for f in found]
            cells = [f"{100 * f['sensitivity']:.0f}, {100 * f['specificity']:.0f}, {f['auroc']:.3f}" for f in of_class]
            rows.append([f"{where}: {label}", figures["n"], *cells])
    lines += table(["X-rays", "n", *names], rows)

    lines += ["## Other hospitals", "", "Share of X-rays called right, % (95 % CI). None was trained on.", ""]
    rows = []
    for group, parts in models[next(iter(models))]["external"].items():
        for part, figures in parts.items():
            cells = [percent(m["external"][group][part]["right"]) for m in models.values()]
            rows.append([f"**{group}**" if part == "all" else f"{group}: {part}", figures["n"], *cells])
    lines += table(["X-rays", "n", *names], rows)

    lines += [
        "What the X-rays of every source are called, counts.",
        "",
        "<details><summary>Confusion by source</summary>",
        "",
    ]
    lines += [*table(["source", "X-rays", "n", "network", *CLASSES], confusion_by_source(models)), "</details>", ""]

    lines += ["## Without lung tissue", ""]
    runs = [(run["settings"]["sees"], run["settings"]["model"], run, run["external"])
            for run in evidence["controls"].values()]  # fmt: skip
    lines += ["Trained by one recipe; only what they see differs.", "", *compared("what it sees", runs)]
    lines += [lungless(evidence["controls"]), ""]
    lines += [
        "## Recipes",
        "",
        "Does another recipe carry further? The mean is that of the three columns before it.",
        "",
    ]
    sorted_runs = sorted(evidence["recipes"].items(), key=lambda run: run[0] != "paper")  # the reference first
    runs = [(describe(run["settings"]), run["settings"]["model"], run, run["external"]) for _, run in sorted_runs]
    lines += compared("recipe", runs)
    lines += ["### The last layer", "", LAST_LAYER, ""]
    runs = []
    for name, m in models.items():
        layer, before = m["last_layer"], m["as_trained"]
        runs.append(("as trained" if layer else "as trained, and as shipped", name, before, before["external"]))
        if layer:
            margins = ", ".join(f"{label} {margin:.1f}" for label, margin in layer["margins"].items() if margin)
            kind = {"refitted": "refitted", "trained": "as trained"}[layer["kind"]]
            runs.append((f"**as shipped**: {kind}, margins {margins or 'none'}", name, m["test"], m["external"]))
    lines += compared("last layer", runs)

    lines += ["## Do the features know the source?", "", "Balanced accuracy of a linear probe, % (95 % CI).", ""]
    rows = []
    for what, first in models[next(iter(models))]["source_probe"].items():
        cells = [percent(m["source_probe"][what]["balanced_accuracy"]) for m in models.values()]
        rows.append([what, f"{100 * first['chance']:.0f}", *cells])
    lines += table(["", "chance", *names], rows)

    lines += ["## Calibration", "", "![Reliability of each network on the test split](reliability.png)", ""]
    rows = []
    for name, m in models.items():
        c = m["calibration"]
        for where in ("test", "external"):
            figures = [c[where][when][what] for what in ("ece", "brier") for when in ("before", "after")]
            cells = [f"{figure:.3f}" for figure in figures]
            chance = "{mean:.3f} (up to {high:.3f})".format(**c[where]["by_chance"])
            cells = [*cells[:2], chance, *cells[2:]]
            rows.append([f"`{name}`", where, c[where]["n"], f"{c['temperature']:.2f}", *cells])
    head = [
        "",
        "X-rays",
        "n",
        "temperature (from val)",
        "ECE before",
        "after",
        "of a perfect network",
        "Brier before",
        "after",
    ]
    lines += table(head, rows)

    lines += ["## When all networks agree", ""]
    rows = [[name, group["n"], percent(group["accuracy"])] for name, group in evidence["agreement"]["groups"].items()]
    lines += table(["X-rays", "n", "accuracy of the majority, % (95 % CI)"], rows)

    lines += ["## Heatmaps", "", f"{evidence['heatmaps']['n']} test X-rays, the true class.", ""]
    measures, rows = ["in lung", "spread", "deletion", "insertion", "as random"], []

    def cells(figures: dict) -> list[str]:
        return ["{value:.3f} ({low:.3f} to {high:.3f})".format(**figures[measure]) for measure in measures]

    for name, m in evidence["heatmaps"]["models"].items():
        rows.append([f"`{name}`", *cells(m)])
        if "minus plain" in m:
            rows.append([f"`{name}` − plain", *cells(m["minus plain"])])
    lines += table(["", *measures], rows)
    lines += [HEATMAP_MEASURES, "", "Agreement: correlation of two networks' heatmaps of the same X-ray.", ""]
    alike = evidence["heatmaps"]["agreement"]
    pairs = {tuple(pair.split(" ~ ")): f"{figure['value']:.2f}" for pair, figure in alike.items()}
    rows = [[f"`{a}`", *(pairs.get((a, b)) or pairs.get((b, a), "") for b in models)] for a in models]
    lines += table(["", *names], rows)

    disturbed = evidence["disturbances"]
    what = (
        f"{disturbed['n']} test X-rays, chosen by chance: accuracy, %, and how many points each disturbance changes it."
    )
    lines += ["## Disturbances", "", what, ""]
    rows = [["accuracy", *(percent(disturbed["changes"]["none"][name]) for name in models)]]
    for change, f in disturbed["changes"].items():
        if change != "none":
            rows.append([change, *(percent(f[name]["minus none"]) for name in models)])
    lines += table(["", *names], rows)

    known = evidence["strangers"]
    lines += ["## Is it an X-ray that the networks know?", "", STRANGERS, ""]
    own = [f"{100 * known[key]:.1f}" for key in ("false_alarms", "warned")]
    rows = [["our test split", known["n"], "", own[0], "", own[1]]]
    for name, f in known["strangers"].items():
        shares = [f"{100 * f[key]:.1f}" for key in ("caught", "false_alarms_at_95", "warned")]
        rows.append([name, f["n"], f"{f['auroc']:.3f}", *shares])
    head = ["pictures", "n", "AUROC", "over the limit, %", "false alarms if 95 % were caught, %", "any warning, %"]
    lines += table(head, rows)

    s = evidence["splits"]
    lines += ["## Splits", "", f"* patients in more than one split: {s['patients_crossing']}"]
    pairs = ", ".join(f"{kind}: {n}" for kind, n in s["near_duplicates"].items()) or "none"
    lines += [f"* near-duplicates across splits, of {s['pictures']} pictures: {pairs}"]
    lines += [f"* of these with another label: {s['of_another_label']}"]
    return "\n".join(lines) + "\n"


def confusion_by_source(models: dict) -> list[list]:
    """Rows [source, what its X-rays show, n, network, how many are called each of `CLASSES`]."""
    rows = []
    first = next(iter(models.values()))
    for source, figures in first["test_by_source"].items():
        for k, label in enumerate(CLASSES):
            if n := sum(figures["confusion"][k]):
                for name, m in models.items():
                    called = m["test_by_source"][source]["confusion"][k]
                    rows.append([f"test: {source}", label, n, f"`{name}`", *called])
    for group, parts in first["external"].items():
        for source, figures in parts.items():
            for name, m in models.items():
                called = m["external"][group][source]["called"].values()
                rows.append([f"other: {source}", group, figures["n"], f"`{name}`", *called])
    return rows


def lungless(controls: dict) -> str:
    """The share of the accuracy that needs no lung tissue, in a sentence."""
    if not {"lungs", "outside"} <= controls.keys():
        return "Share of the accuracy that needs no lung tissue: not measured."
    seen, blind = (controls[sees]["accuracy"]["value"] for sees in ("lungs", "outside"))
    commonest = max(map(sum, controls["lungs"]["confusion"])) / controls["lungs"]["n"]
    return (
        f"**Share of the accuracy that needs no lung tissue: {100 * blind / seen:.0f} %** ({100 * blind:.1f} of "
        f"{100 * seen:.1f}; who always answers the commonest class has {100 * commonest:.1f})."
    )


def headline(evidence: dict) -> str:
    """The figures that belong beside every accuracy: test, other hospitals, and without lung tissue."""
    groups = list(next(iter(evidence["models"].values()))["external"])
    lines = ["| share called right, % (95 % CI) | our test split | " + " | ".join(f"other: {g}" for g in groups) + " |"]
    lines.append("|" + "---|" * (2 + len(groups)))
    for name, m in evidence["models"].items():
        cells = [percent(m["external"][group]["all"]["right"]) for group in groups]
        lines.append(f"| `{name}` | {percent(m['test']['accuracy'])} | " + " | ".join(cells) + " |")
    for sees, what in (("lungs", "short training, lungs shown"), ("outside", "short training, lungs blacked out")):
        run = evidence["controls"].get(sees)
        cells = [percent(run["external"][group]["all"]["right"]) if run else "–" for group in groups]
        accuracy = percent(run["accuracy"]) if run else "not measured"
        lines.append(f"| control: {what} | {accuracy} | {' | '.join(cells)} |")
    lines += ["", lungless(evidence["controls"])]
    return "\n".join(lines) + "\n"


def record(evidence: dict, weights: Path) -> None:
    """Put temperatures into the manifest, which the pipeline uses, and the headline into model card and README."""
    models = read_manifest(weights)
    for name, figures in evidence["models"].items():
        models[name]["temperature"] = figures["calibration"]["temperature"]
    write_manifest(weights, models)
    for path in (weights / "MODEL_CARD.md", weights.parent / "README.md"):
        if path.exists():
            write_between(path, "evidence", headline(evidence))


def main() -> None:
    """Measure all of it and write the page."""
    p = options(__doc__)
    p.add_argument("--controls", default="runs/controls", type=Path, help="folder with the controls' trainings")
    p.add_argument("--recipes", default="runs/recipes", type=Path, help="folder with trainings by other recipes")
    p.add_argument("--out", default="results", type=Path)
    p.add_argument("--heatmaps", type=int, default=50, help="test X-rays whose heatmaps are studied")
    p.add_argument("--disturbed", type=int, default=200, help="test X-rays that are disturbed")
    p.add_argument("--only", nargs="+", choices=SECTIONS, help="measure these anew, keep the rest of evidence.json")
    p.add_argument("--record", action="store_true", help="write temperatures and headline into manifest, card, README")
    args = p.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    shipped = read_manifest(args.weights)
    entries = {name: shipped[name] for name in list_models() if name in shipped}

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "evidence.json"
    evidence = json.loads(path.read_text()) if path.exists() else {}
    measures = {
        "strangers": lambda: {"strangers": familiarity.measure(args.data, args.weights, args.cache)},
        "models": lambda: dict(zip(("models", "agreement"), studies(args, entries))),
        "controls": lambda: {"controls": evidence.get("controls", {}) | trainings(args, args.controls)},
        "recipes": lambda: {"recipes": evidence.get("recipes", {}) | trainings(args, args.recipes)},
        "heatmaps": lambda: {"heatmaps": heatmaps(args, entries)},
        "disturbances": lambda: {"disturbances": disturbances(args, entries)},
        "splits": lambda: {"splits": splits(args)},
    }
    wanted = args.only or SECTIONS
    for done, section in enumerate(wanted):
        start = time.perf_counter()
        try:
            evidence |= measures[section]()
        except KeyboardInterrupt:
            rest = " ".join(wanted[done:])
            raise SystemExit(f"Interrupted; the same command with `--only {rest}` measures the rest.") from None
        part = path.with_suffix(".part")
        part.write_text(json.dumps(evidence, indent=2) + "\n")
        part.replace(path)  # what was measured stays, whatever interrupts the rest
        print(f"{section}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    if missing := [section for section in SECTIONS if section not in evidence]:
        raise SystemExit(f"{path} is not complete: add `--only {' '.join(missing)}`.")
    (args.out / "evidence.md").write_text(markdown(evidence))
    reliability({name: m["calibration"] for name, m in evidence["models"].items()}, args.out)
    print(markdown(evidence))
    if args.record:
        record(evidence, args.weights)


if __name__ == "__main__":
    main()
