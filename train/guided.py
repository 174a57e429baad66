"""Guided attention in three stages (Danilov et al. 2021): the frozen body, the whole network, the lung mask.

    python -m train.guided --data DATA --out runs/guided

trains what is missing below --out, BACKBONE/SEED/STAGE, goes on with what was interrupted, skips what is finished, and
writes results/guided/tables.md and results.json, to which another machine's trainings can be added. The tables tell
what a finished stage was trained with, whatever the command asks for now.

Stage I trains the paper's head on the features of a frozen body, which are computed once and kept in --cache. The
--best backbones by validation accuracy go on. Stage II trains body and head. Stage III multiplies the body's features
by the lung mask (direct guidance), and its loss is L_clas + α L_attn with attention mining (indirect, `train.gain`).
Each stage starts from the best epoch of the one before.

SGD has momentum 0.9, as MANet's: the paper is silent, and at its learning rate of 1e-4 a network without momentum
hardly moves. The X-rays of stages II and III are augmented as MANet's. `--steps` shortens an epoch, and epochs then go
through all X-rays in turn.
"""

import argparse
import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from manet_core import list_models
from manet_core.networks.registry import spec
from manet_core.tasks import GUIDED, get_task

from . import gain, run_verb
from .classify import predict, probabilities
from .data import LungPictures, Pictures, state
from .engine import device_of
from .measures.classification import read_test
from .measures.heatmaps import heatmap, in_lung
from .measures.localisation import localise, read_lesions
from .measures.markdown import number, percent, table, write_among_papers
from .measures.statistics import bootstrap_weights, even_sample, mean, proportion
from .measures.study import NotMeasured
from .recipe import Run, add_options, add_run_options, recipe_from, run_from
from .stages import OWN, STAGES, GuidedRecipe, frozen_features, stage_folder, train_stage, trained_network, xrays

BACKBONES = tuple(name.removesuffix("_guided") for name in list_models() if name.endswith("_guided"))
PAPERS_TEN = tuple(name for name in BACKBONES if name != "efficientnet_lite0")


def read_split(recipe: GuidedRecipe, run: Run, net: nn.Module, split: str) -> dict:
    """Accuracy and every class's sensitivity of a stage's network on a split, with intervals over patients."""
    task, device = get_task(recipe.task), device_of(run)
    guided = bool(net.guidance)
    dataset = xrays(recipe, run, split, masks=guided)
    if recipe.stage == "I":
        features = torch.from_numpy(frozen_features(recipe, run, net, dataset, split))[:, :, None, None].to(device)
        with torch.inference_mode():
            predicted = probabilities(net.head(features), task).cpu().numpy()
    else:
        predicted = predict(net, dataset, device, asked=task)
    truth, patients = dataset.targets.argmax(1), dataset.pictures.index.patient.to_numpy()[dataset.rows]
    found = read_test(predicted, truth, bootstrap_weights(patients), task.classes)
    hit = predicted.argmax(1) == truth
    for k, name in enumerate(task.classes):
        if (mine := truth == k).any():
            found["per_class"].setdefault(name, {"n": int(mine.sum())})["sensitivity"] = proportion(
                hit[mine], patients[mine]
            )
    return found


def read_attention(net: nn.Module, dataset: LungPictures, omega: float, sigma: float) -> dict[str, list[float]]:
    """What the Grad-CAM of the true class says of each X-ray of a data set, one value an X-ray.

    "in_lung" is its share inside the lungs, "lungs" the share of the picture that they are; "before" is the true
    class's probability, and "after" what `gain.remaining` leaves of it.
    """
    device = next(net.parameters()).device
    out: dict[str, list[float]] = {name: [] for name in ("in_lung", "lungs", "before", "after")}
    for image, mask, target in tqdm(dataset, "heatmaps", unit="X-ray"):
        label = int(target.argmax())
        out["in_lung"].append(in_lung(heatmap(net, image, mask, label), mask[0].numpy()))
        out["lungs"].append(float(mask.mean()))
        image, mask, true = image[None].to(device), mask[None].to(device), torch.tensor([label], device=device)
        with torch.no_grad():
            features = net.forward_features(image, mask)
        features.requires_grad_()
        logits = net.forward_head(features)
        out["before"].append(logits.softmax(1)[0, label].item())
        out["after"].append(gain.remaining(net, image, mask, features, logits, true, omega, sigma).item())
    return out


def read_lesion_heatmaps(recipe: GuidedRecipe, run: Run, net: nn.Module) -> dict | None:
    """`measures.localisation.localise` at the network's input size; None where the data have no lesions' outlines."""
    try:
        lesions = {str(lesion.image): lesion for lesion in read_lesions(Path(run.data))}
    except NotMeasured:
        return None
    pictures = Pictures(run.data, recipe.size, run.cache)
    paths = [str(Path(name).resolve()) for name in pictures.index.image]
    rows = np.array([row for row, path in enumerate(paths) if path in lesions], np.int64)
    dataset = xrays(recipe, run, rows=rows, masks=True)
    heats, lungs, outlines, patients = [], [], [], []
    for row, (image, mask, target) in zip(rows, dataset):
        if target.sum() == 1:
            lesion = lesions[paths[row]]
            heats.append(heatmap(net, image, mask, int(target.argmax())))
            lungs.append(mask[0].numpy() > 0)
            outlines.append(lesion.outline((recipe.size, recipe.size)))
            patients.append(lesion.patient)
    if len(heats) < 2:  # each heatmap is compared with another one's
        return None
    return localise(heats, lungs, outlines, patients) | {"patients": len(set(patients))}


def measure_stage(recipe: GuidedRecipe, run: Run, folder: Path, heatmaps: int) -> dict:
    """All that the tables say of a finished stage; kept in its folder, as long as its weights are the same."""
    weights, kept = folder / "best.safetensors", folder / "measured.json"
    asked = {"weights": hashlib.sha256(weights.read_bytes()).hexdigest(), "heatmaps": heatmaps, "state": state(run)}
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["asked"] == asked:
            return found
    net = trained_network(recipe, weights).to(device_of(run))
    found = {"asked": asked} | {split: read_split(recipe, run, net, split) for split in ("val", "test")}
    train_set, test_set = xrays(recipe, run, "train"), xrays(recipe, run, "test")
    whole = recipe.stage == "I" or not recipe.steps
    found["films"] = len(train_set) if whole else recipe.steps * recipe.batch
    index = test_set.pictures.index.iloc[test_set.rows]
    at = even_sample(test_set.targets.argmax(1), index.source.to_numpy(), n=heatmaps)
    sample = xrays(recipe, run, rows=test_set.rows[at], masks=True)
    found["attention"] = read_attention(net, sample, recipe.omega, recipe.sigma)
    found["attention_patients"] = index.patient.iloc[at].to_list()
    found["lesions"] = read_lesion_heatmaps(recipe, run, net)
    kept.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def read_runs(out: Path, run: Run, heatmaps: int) -> list[dict]:
    """A row for each finished stage below `out`: what it was trained with, and what was measured."""
    rows = []
    for path in sorted(out.glob("*/*/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(GuidedRecipe)}
        recipe = GuidedRecipe(**{key: value for key, value in result["settings"].items() if key in known})
        if path.parent != stage_folder(out, recipe):
            print(f"{path.parent} holds another training than its name says and is left out.")
            continue
        found = measure_stage(recipe, run, path.parent, heatmaps)
        epochs = len((path.with_name("log.csv")).read_text(encoding="utf-8").splitlines()) - 1
        rows.append(
            {"backbone": recipe.backbone, "seed": recipe.seed, "stage": recipe.stage, "recipe": asdict(recipe)}
            | {"films": found["films"], "epochs": epochs, "best_epoch": result["validation"]["epoch"]}
            | {"minutes": round(result["seconds"] / 60, 1), "device": result["device"]}
            | {"val": found["val"], "test": found["test"], "lesions": found["lesions"]}
            | {"attention": summarise(found), "values": found}
        )
    rows.sort(key=row_key)
    for before, row in zip(rows, rows[1:]):  # each stage against the one before it, in pairs of X-rays
        a, b = before["values"], row["values"]
        same = (before["backbone"], before["seed"]) == (row["backbone"], row["seed"])
        if same and a["attention_patients"] == b["attention_patients"]:
            weights = bootstrap_weights(np.array(b["attention_patients"]))
            row["attention"]["minus_stage_before"] = {
                name: mean(np.array(b["attention"][name]) - np.array(a["attention"][name]), weights)
                for name in ("in_lung", "before", "after")
            }
    return [{key: value for key, value in row.items() if key != "values"} for row in rows]


def summarise(found: dict) -> dict:
    """Means over X-rays, with intervals over patients, of what `read_attention` says."""
    weights = bootstrap_weights(np.array(found["attention_patients"]))
    means = {name: mean(np.array(values), weights) for name, values in found["attention"].items()}
    return {"n": len(found["attention_patients"])} | means


def row_key(row: dict) -> tuple:
    """Where a row stands: by backbone, seed, stage; then by how stage III guides."""
    recipe = row["recipe"]
    return (
        *(BACKBONES.index(row["backbone"]), row["seed"], STAGES.index(row["stage"])),
        *(recipe["direct"], recipe["alpha"]),
    )


PLACES = {"val": "validation", "test": "test"}
HEATMAPS = """\
Grad-CAM of the true class on test X-rays, even over classes and sources. In lung: the heatmap's share inside the
predicted lungs, beside the share of the picture that they are, which an even heatmap would have. Remaining: the true
class's probability on the X-ray as it is → what is left of it where the heatmap has been erased, which stage III's loss
lowers (GAIN, eq. 5). Differences are to the stage before, in pairs of X-rays, points (95 % CI over patients)."""
LESIONS = """\
Radiologists' outlines of lesions, heatmaps at the network's input size; most of these X-rays are in the training split,
but without their outlines. Enrichment: the lesion's share of the heatmap inside the lungs over its share of the lungs;
1 is chance. The difference is to the heatmap of another patient, and is what the heatmap knows of this X-ray."""


def name_of(row: dict) -> list[str]:
    """The first cells of every table: backbone, stage, how it was trained."""
    recipe = row["recipe"]
    start = "ImageNet" if recipe["imagenet"] else "random weights"
    trained = f"{start}, seed {row['seed']}; {row['films']} X-rays × {row['epochs']} epochs, best {row['best_epoch']}"
    trained += f"; {recipe['optimizer']} {recipe['lr']:g}"
    stage, guided = row["stage"], recipe["direct"] or recipe["alpha"]
    if stage == "III" and guided:
        trained += f"; α {recipe['alpha']:g}" + ("" if recipe["direct"] else ", mask not multiplied")
    elif stage == "III":
        stage += " without guidance"
    return [f"{spec(recipe['model']).title} at {recipe['size']}", stage, trained]


def accuracy_table(rows: list[dict], split: str) -> list[str]:
    """Accuracy and sensitivities on a split, with what was published beside them."""
    cells = []
    for row in rows:
        found = row[split]
        of_class = [found["per_class"].get(name, {}).get("sensitivity") for name in GUIDED.classes]
        counts = " / ".join(str(found["per_class"].get(name, {}).get("n", 0)) for name in GUIDED.classes)
        figures = [percent(figure) if figure else "" for figure in of_class]
        cells.append([*name_of(row), percent(found["accuracy"]), *figures, f"{found['n']}: {counts}"])
    published = {"val": "88", "test": "84"}[split]
    cells.append(["VGG-16, the paper's best", "", "Danilov et al., their data", published, "", "", "", ""])
    if split == "test":
        cells.append(
            ["COVID-Net, published", "", "Wang et al. 2020, COVIDx; not run here", "93.3", "95", "94", "91", ""]
        )
    head = ["network", "stage", "trained", f"{PLACES[split]}: accuracy, % (95 % CI)"]
    return table([*head, *(f"sensitivity: {name}" for name in GUIDED.classes), "n: of each class"], cells)


def markdown(rows: list[dict]) -> str:
    """tables.md."""
    lines = ["# Guided attention", "", "`python -m train.guided` wrote this. Every row is one training.", ""]
    for split, where in PLACES.items():
        lines += [f"## {where.capitalize()}", "", *accuracy_table(rows, split)]
    heat, lesions = [], []
    for row in rows:
        a = row["attention"]
        gap = a.get("minus_stage_before", {})
        differences = [percent(gap[name]) if gap else "" for name in ("in_lung", "after")]
        remaining = f"{percent(a['before'])} → {percent(a['after'])}"
        heat.append([*name_of(row)[:2], a["n"], percent(a["lungs"]), percent(a["in_lung"]), differences[0]])
        heat[-1] += [remaining, differences[1]]
        if found := row["lesions"]:
            figures = [number(found[name], 2) for name in ("enrichment", "enrichment_minus_other")]
            hits = [percent(found[name]) for name in ("pointing", "pointing_minus_other")]
            lesions.append([*name_of(row)[:2], found["n"], found["patients"], *figures, *hits])
    head = ["network", "stage", "n", "lungs, %", "in lung, %", "difference", "remaining, %", "difference"]
    lines += ["## Heatmaps", "", HEATMAPS, "", *table(head, heat)]
    if lesions:
        head = ["network", "stage", "n", "patients", "enrichment (95 % CI)", "difference", "pointing, %", "difference"]
        lines += ["## Lesions", "", LESIONS, "", *table(head, lesions)]
    return "\n".join(lines)


def headline(rows: list[dict]) -> str:
    """The table of docs/papers.md: accuracy of each stage, and where its heatmaps lie."""
    cells = []
    for row in rows:
        a = row["attention"]
        lungs = f"{percent(a['in_lung'])}, lungs {100 * a['lungs']['value']:.0f}"
        cells.append([*name_of(row), *(percent(row[split]["accuracy"]) for split in PLACES), row["test"]["n"], lungs])
    cells.append(["VGG-16, the paper's best", "", "Danilov et al., their data", "88", "84", "", ""])
    head = ["network", "stage", "trained", "accuracy, %: validation", "test", "n", "heatmap in lung, %"]
    return "\n".join(table(head, cells)).rstrip("\n") + "\n"


def report(rows: list[dict], folder: Path) -> None:
    """Write results.json, tables.md and the table of docs/papers.md; what else `folder` holds of trainings stays."""
    path = folder / "results.json"
    new = {row_key(row) for row in rows}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = sorted([*rows, *(row for row in kept if row_key(row) not in new)], key=row_key)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / "tables.md").write_text(markdown(rows), encoding="utf-8")
    write_among_papers(folder, "guided", headline(rows))


def main() -> None:
    """Train and report from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backbones", nargs="+", choices=BACKBONES, default=PAPERS_TEN, metavar="BACKBONE")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    p.add_argument("--best", type=int, default=4, help="backbones that go on after stage I, by validation accuracy")
    p.add_argument("--heatmaps", type=int, default=100, help="test X-rays whose heatmaps are measured")
    p.add_argument("--report", action="store_true", help="train nothing")
    p.add_argument("--results", type=Path, default=Path("results/guided"), help="folder for tables and figures")
    group = p.add_argument_group("guidance")
    for f in OWN:
        if f.name not in ("stage", "start"):
            kind = (
                {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default)}
            )
            text = f"{f.metadata['help']} (default: {f.default})"
            group.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    add_run_options(p)
    left_out = ("task", "model", "init", "augment", "working", "crop", "sees", "sources", "split", "findings")
    add_options(p, "classify", leave_out=left_out)
    p.set_defaults(recipe="guided")
    args = p.parse_args()
    run, shared = run_from(args), recipe_from(args, "classify")
    own = {f.name: getattr(args, f.name) for f in OWN if f.name not in ("stage", "start")}
    sizes = {} if args.size else {name: spec(f"{name}_guided").size for name in args.backbones}
    recipes = {
        name: GuidedRecipe(**asdict(replace(shared, model=f"{name}_guided", size=sizes.get(name, shared.size))) | own)
        for name in args.backbones
    }
    chosen = list(recipes)
    for stage in () if args.report else [stage for stage in STAGES if stage in args.stages]:
        results = {name: train_stage(replace(recipes[name], stage=stage), run) for name in chosen}
        if stage == "I":
            chosen = sorted(chosen, key=lambda name: -results[name]["validation"]["accuracy"])[: args.best]
    rows = read_runs(Path(args.out), run, args.heatmaps)
    if not rows:
        raise SystemExit(f"There is no finished stage below {args.out}: leave --report away.")
    report(rows, args.results)
    print((args.results / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_verb(main)
