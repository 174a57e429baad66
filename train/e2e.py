"""Segmenter and classifier trained together, against the two stages trained apart.

    python -m train.e2e --data DATA --model efficientnet_lite0_e2e --out runs/e2e

starts from the two stages' weights (`--weights`), and trains for each seed below --out

* `joint/SEED`: one network, Dice loss of the mask where the X-ray has a reference mask, and cross entropy of all;
* `two-stage/SEED`: the same classifier on the cleaned mask of the segmenter, which stays as it is; cross entropy alone.

Both see the same whole films under the same augmentation in the same order, with every other setting alike. What is
missing is trained, what was interrupted goes on, what is finished is skipped. Then results.json and tables.md compare
them on the test split: accuracy and mean sensitivity paired over patients, and lung masks before and after.

The defaults are meant for a GPU. `--films` sets the films of an epoch, `--test` and `--val` how many films are read.
"""

import argparse
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from manet_core import list_models
from manet_core.lungs import Lungs
from manet_core.networks import e2e
from manet_core.networks.registry import split_name
from manet_core.preprocess import WHOLE, View, to_unit_range
from manet_core.tasks import MANET
from manet_core.weights import WeightsError, fingerprint, load_network, read_manifest

from . import broad, run_verb
from .classify import class_loss, figures, predict
from .data import LungPictures, Pictures, draw_weights, predicted_lungs
from .engine import device_of, fit, memory_format
from .measures.markdown import percent, table, write_among_papers, write_results
from .measures.statistics import bootstrap_weights, group_means, interval, spread
from .recipe import Recipe, Run, add_run_options, run_from, setting
from .segment import convention, dice_loss, intersection_over_union

TITLES = {"two-stage": "two stages", "joint": "end to end"}  # the arms that are compared
ARMS = tuple(TITLES)


_setting = partial(setting, paper=False)  # the paper leaves all of this for later


@dataclass(frozen=True)
class EndToEndRecipe(Recipe):
    """A `Recipe` and what a network end to end needs besides."""

    arm: str = _setting("joint", "of ARMS")
    dice: float = _setting(1.0, "weight of the Dice loss")
    cross_entropy: float = _setting(1.0, "weight of the cross entropy")
    films: int = _setting(0, "films of an epoch; 0: as many as there are")
    val: int = _setting(0, "films to validate on; 0: all")
    start: str = _setting("", "classifier to start from, of --weights or a .safetensors file; default: BACKBONE_nma")


RECIPE = EndToEndRecipe(
    model="efficientnet_lite0_e2e", size=e2e.SIZE, epochs=10, batch=64, optimizer="adamw", lr=2e-4, weight_decay=0.01,
    schedule="onecycle", augment="broad", balance=0.5, balance_classes=True, label_smoothing=0.05, select="macro_f1",
    sees="whole", width=e2e.WIDTH, conventions=e2e.CONVENTIONS,
)  # fmt: skip
OPTIONS = (
    *("model", "size", "epochs", "batch", "lr", "weight_decay", "balance", "label_smoothing", "select", "precision"),
    *("dice", "cross_entropy", "films", "val", "start"),
)
SELECT = ("val_loss", "accuracy", "macro_f1", "group_sensitivity")  # figures that both arms have


class TwoStages(e2e.EndToEnd):
    """The same network with what lies between the paper's stages: the mask is thresholded and cleaned.

    Its segmenter does not learn.
    """

    def __init__(self, backbone: str, attention: str, num_classes: int, in_channels: int = 1):
        super().__init__(backbone, attention, num_classes, in_channels)
        self.segmenter.requires_grad_(False)

    def train(self, mode: bool = True) -> "TwoStages":
        """Training mode for all but the segmenter, whose batch norms keep their statistics."""
        super().train(mode)
        self.segmenter.eval()
        return self

    def between(self, mask: Tensor, size: tuple[int, int]) -> Tensor:
        """The mask as the pipeline gives it to a classifier: (B, 1, *size), 0 or 1."""
        lungs = [Lungs.from_probability(probability).at(size) for probability in mask[:, 0].cpu().numpy()]
        return torch.from_numpy(np.stack(lungs)[:, None]).to(mask)


NETWORKS = {"two-stage": TwoStages, "joint": e2e.EndToEnd}


class Films(Dataset):
    """Batches of whole X-rays for `train.broad`, read from the memory-mapped pictures.

    A batch is image (B, 1, S, S) uint8, reference mask (B, 1, S, S) bool, whether there is one (B,) bool, the
    segmenter's output for its annotators (B,) int64, and the target (B, K) float32.

    Args:
        films: the length of an epoch.
    """

    def __init__(self, pictures: Pictures, rows: np.ndarray, films: int):
        self.pictures, self.rows, self.films, self.epoch = pictures, rows, films, 0
        self.index = pictures.index.iloc[rows]
        self.known = (self.index["mask"] != "").to_numpy()
        self.outputs = convention(self.index, e2e.CONVENTIONS)
        self.targets = pictures.targets(rows)

    def __len__(self) -> int:
        return self.films

    def __getitems__(self, items: list[int]) -> list[Tensor]:
        rows = self.rows[items]
        arrays = (self.pictures.images[rows][:, None], self.pictures.masks[rows][:, None])
        return [torch.from_numpy(a) for a in (*arrays, self.known[items], self.outputs[items], self.targets[items])]


def started(recipe: EndToEndRecipe, run: Run) -> e2e.EndToEnd:
    """The network of `recipe.arm` with the weights of the two stages.

    Raises:
        SystemExit: there are none, or they are of other networks; the text says which.
    """
    backbone = split_name(recipe.model)[0]
    start, what = recipe.start or f"{backbone}_nma", "segmenter"
    net = NETWORKS[recipe.arm](backbone, "e2e", len(MANET.classes), 1)
    try:
        net.segmenter.load_state_dict(load_network(run.weights, "resunet").state_dict())
        what = f"classifier {start}"
        from_file = Path(start).suffix == ".safetensors"
        state = load_file(start) if from_file else load_network(run.weights, start).state_dict()
        net.classifier.load_state_dict(state)
    except WeightsError as error:
        raise SystemExit(f"{error} Train a classifier and name its weights with --start.") from None
    except (RuntimeError, OSError):
        raise SystemExit(f"The weights of the {what} are missing, or not those of a part of {recipe.model}.") from None
    return net


@torch.inference_mode()
def read(
    net: e2e.EndToEnd, pictures: Pictures, rows: np.ndarray, device: torch.device, weights: str
) -> dict[str, np.ndarray]:
    """What a network says of X-rays.

    The segmenter of `TwoStages` never changes: its masks are those that all trainings share (`predicted_lungs`).

    Returns:
        {"probabilities": (n, K)}, and of a network end to end "iou" (n,): of the mask thresholded, by the convention of
        the X-ray's annotators, and not cleaned; NaN where there is no reference mask.
    """
    if isinstance(net, TwoStages):
        lungs = predicted_lungs(pictures, weights, rows)
        return {"probabilities": predict(net.classifier, LungPictures("classify", pictures, rows, lungs), device)}
    index, probabilities, ious = pictures.index.iloc[rows], [], []
    outputs = convention(index, e2e.CONVENTIONS)
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        whole = [2 * to_unit_range(picture.astype(np.float32) / 255) - 1 for picture in pictures.images[part]]
        logits, masks = net(torch.from_numpy(np.stack(whole))[:, None].to(device), every_convention=True)
        probabilities.append(logits.float().softmax(1).cpu().numpy())
        found = masks.cpu().numpy()[np.arange(len(part)), outputs[start : start + 16]] > 0
        reference = _at_segmenter(torch.from_numpy(pictures.masks[part])[:, None])[:, 0].numpy() > 0
        ious.append(intersection_over_union(found, reference))
    iou = np.where(index["mask"] != "", np.concatenate(ious), np.nan)
    return {"probabilities": np.concatenate(probabilities), "iou": iou}


def _at_segmenter(reference: Tensor) -> Tensor:
    """Reference masks (B, 1, S, S) at the segmenter's size, float, 0 or 1."""
    return (F.interpolate(reference.float(), (e2e.SIZE, e2e.SIZE), mode="bilinear", antialias=True) > 0.5).float()


def train(recipe: EndToEndRecipe, run: Run) -> dict:
    """Train one arm; what `fit` returns and leaves in `run.out`. Of a finished one it only checks the settings."""
    torch.manual_seed(recipe.seed)
    device, net = device_of(run), started(recipe, run)
    pictures = Pictures(run.data, recipe.size, run.cache)
    rows = pictures.rows(*MANET.splits, task=MANET)
    train_set = Films(pictures, rows, recipe.films or len(rows))
    seen = sample(pictures.rows("val", task=MANET), recipe.val)
    labels, index = pictures.labels(seen), pictures.index.iloc[seen]
    groups = (index.label + " of " + index.source).to_numpy()
    draws, layout = broad.Draws(recipe.seed, device), memory_format(recipe, device)
    whole = torch.tensor(WHOLE, device=device)

    def loss(net: nn.Module, batch: list[Tensor]) -> Tensor:
        images, references, known, outputs, targets = batch
        with torch.autocast(device.type, enabled=False):
            generator = draws.of(train_set.epoch)
            images, references = broad.broad(
                images.float() / 255, references.float(), whole.expand(len(images), 4), recipe.size, generator, False
            )
            images = broad.shown(images, references, "whole")
        logits, masks = net(images.to(memory_format=layout), every_convention=True)
        total = recipe.cross_entropy * class_loss(logits, targets, MANET, recipe.label_smoothing)
        if recipe.arm == "joint" and known.any():
            masks = masks[torch.arange(len(masks), device=device), outputs][known, None]
            total = total + recipe.dice * dice_loss(masks, _at_segmenter(references[known]))
        return total

    def validate(net: nn.Module, device: torch.device) -> dict[str, float]:
        found = read(net, pictures, seen, device, run.weights)
        figure = figures(found["probabilities"], pictures.targets(seen), labels, groups, MANET)
        known = np.isfinite(found.get("iou", np.array([])))
        return figure | ({"iou": float(found["iou"][known].mean())} if known.any() else {})

    draw = draw_weights(train_set.index.label, train_set.index.source, recipe.balance, recipe.balance_classes)
    return fit(recipe, run, net, train_set, loss, validate, draw)


def sample(rows: np.ndarray, n: int) -> np.ndarray:
    """`n` of `rows`, always the same ones; all of them for 0."""
    return rows if n == 0 else np.sort(np.random.default_rng(0).permutation(rows)[:n])


# --- the comparison -------------------------------------------------------------------------------------------------


def measure(trained: list[tuple[EndToEndRecipe, Run]], n: int) -> dict:
    """Compare finished trainings, and what they started from, on `n` X-rays of the test split, 0 for all."""
    recipe, run = trained[0]
    device, pictures = device_of(run), Pictures(run.data, recipe.size, run.cache)
    rows = sample(pictures.rows("test", labelled=True), n)
    index, labels = pictures.index.iloc[rows], pictures.labels(rows)
    entries, start = read_manifest(run.weights), recipe.start or f"{split_name(recipe.model)[0]}_nma"
    answers: dict[str, list[dict]] = {}
    if start in entries:
        print(f"testing {start} as the page shows it X-rays", flush=True)
        view = View.of(entries[start]["preprocessing"])
        at = pictures.resized(view.working)
        shown = LungPictures("classify", at, rows, predicted_lungs(at, run.weights, rows), view=view)
        net = load_network(run.weights, start, device)
        answers["two stages, as shipped"] = [{"probabilities": predict(net, shown, device)}]
    for arm in ARMS:
        finished = [(r, where) for r, where in trained if r.arm == arm]
        title = TITLES[arm]
        print(f"testing: {title}, not fine-tuned", flush=True)
        net = started(replace(recipe, arm=arm), run).eval().to(device)
        answers[f"{title}, not fine-tuned"] = [read(net, pictures, rows, device, run.weights)]
        answers[title] = []
        for r, where in finished:
            print(f"testing: {title}, seed {r.seed}", flush=True)
            net.load_state_dict(load_file(Path(where.out) / "best.safetensors"))
            answers[title].append(read(net, pictures, rows, device, run.weights))
    logs = [(r.arm, json.loads((Path(w.out) / "result.json").read_text(encoding="utf-8"))) for r, w in trained]
    return {
        "model": recipe.model,
        "recipe": {k: v for k, v in asdict(recipe).items() if k not in ("arm", "seed")},
        "seeds": sorted({r.seed for r, _ in trained}),
        "films": recipe.epochs * (recipe.films or len(pictures.rows(*MANET.splits, task=MANET))),
        "seconds": {TITLES[arm]: round(sum(log["seconds"] for a, log in logs if a == arm)) for arm in ARMS},
        "kept": {TITLES[arm]: [log["validation"]["epoch"] for a, log in logs if a == arm] for arm in ARMS},
        "device": logs[0][1]["device"],
        "started_from": {name: fingerprint(entries[name]) for name in ("resunet", start) if name in entries},
        "n": len(rows),
        "patients": int(index.patient.nunique()),
        "masks": int((index["mask"] != "").sum()),
        **compare(answers, labels, index.patient.to_numpy()),
    }


def compare(answers: dict[str, list[dict]], labels: np.ndarray, patients: np.ndarray) -> dict:
    """Figures of each system and the differences between them, with intervals over patients and trials.

    Args:
        answers: of each system and trial, what `read` returned of the same X-rays (N,).
        labels: (N,) class numbers.
        patients: (N,) names.
    """
    weights, everyone = bootstrap_weights(patients), np.ones((len(labels), 1), bool)
    classes = {name: labels == k for k, name in enumerate(MANET.classes) if (labels == k).any()}
    of_class = np.stack(list(classes.values()), 1)

    def classified(right: np.ndarray) -> dict:
        return {
            "accuracy": over_trials(right, everyone, weights),
            "mean_sensitivity": over_trials(right, of_class, weights),
        }

    def segmented(iou: np.ndarray, minus: np.ndarray | None = None) -> dict:
        known = np.isfinite(iou[0])
        found = {}
        for name, of in (("iou", lambda x: x), ("dice", lambda x: 2 * x / (1 + x))):
            values = of(iou[:, known]) - (0 if minus is None else of(minus[:, known]))
            found[name] = over_trials(values, everyone[known], bootstrap_weights(patients[known]))
        return found

    right = {s: np.stack([t["probabilities"].argmax(1) == labels for t in a]).astype(float) for s, a in answers.items()}
    iou = {s: np.stack([t["iou"] for t in a]) for s, a in answers.items() if "iou" in a[0]}
    systems = {}
    for system in answers:
        systems[system] = {"trials": len(answers[system])} | classified(right[system])
        systems[system]["sensitivity"] = {
            name: over_trials(right[system], members[:, None], weights) | {"n": int(members.sum())}
            for name, members in classes.items()
        }
        if system in iou and np.isfinite(iou[system]).any():
            systems[system] |= segmented(iou[system])
    apart, together = TITLES["two-stage"], TITLES["joint"]
    before = f"{together}, not fine-tuned"
    differences = classified(right[together] - right[apart])
    if np.isfinite(iou[before]).any():
        differences |= segmented(iou[together], iou[before])
    return {"systems": systems, "differences": differences}


def over_trials(values: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Mean over `groups` (N, G) bool of the means of `values` (T, N); its interval resamples patients and trials."""
    means, drawn = zip(*(group_means(trial, groups, weights) for trial in values))
    return interval(np.mean(means), spread(np.mean(drawn, 2)))  # a draw without any of a group counts for nothing


def markdown(results: dict) -> str:
    """The comparison as Markdown."""
    rows = []
    for name, s in results["systems"].items():
        masks = [percent(s[key]) if key in s else "" for key in ("iou", "dice")]
        rows.append([name, s["trials"], percent(s["accuracy"]), percent(s["mean_sensitivity"]), *masks])
    head = ["accuracy, % (95 % CI)", "mean sensitivity, % (95 % CI)", "lung IoU, % (95 % CI)", "lung Dice, % (95 % CI)"]
    lines = table([f"`{results['model']}`", "trials", *head], rows)
    d = results["differences"]
    figures = [percent(d[key]) for key in ("accuracy", "mean_sensitivity")]
    lines += table(
        ["points (95 % CI)", "accuracy", "mean sensitivity"], [["end to end − two stages, both fine-tuned", *figures]]
    )
    if "iou" in d:
        rows = [["end to end: masks after − before", percent(d["iou"]), percent(d["dice"])]]
        lines += table(["points (95 % CI)", "lung IoU", "lung Dice"], rows)
    rows = [
        [name, *(f"{100 * figure['value']:.0f}" for figure in s["sensitivity"].values())]
        for name, s in results["systems"].items()
    ]
    first = next(iter(results["systems"].values()))["sensitivity"]
    lines += table(["sensitivity, %", *(f"{name} (n = {figure['n']})" for name, figure in first.items())], rows)
    recipe, minutes = results["recipe"], {name: f"{seconds / 60:.0f}" for name, seconds in results["seconds"].items()}
    kept = [f"{', '.join(map(str, epochs))} ({name})" for name, epochs in results["kept"].items()]
    lines += [
        f"* Tested on {results['n']} X-rays of {results['patients']} patients, {results['masks']} with a reference"
        " mask.",
        f"* Fine-tuned for {recipe['epochs']} epochs, {results['films']} films in all, batches of {recipe['batch']},"
        f" learning rate {recipe['lr']:g}; seeds {', '.join(map(str, results['seeds']))}.",
        f"* By {recipe['select']} on {recipe['val'] or 'all'} validation films this epoch was kept: {'; '.join(kept)}.",
        f"* Training took {' and '.join(f'{m} minutes ({name})' for name, m in minutes.items())} on the"
        f" {results['device'].upper()}.",
        "* *As shipped*, the box around the lungs is cut out; all others are shown whole films.",
    ]
    return "\n".join(lines) + "\n"


def options() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trials", type=int, default=3, help="seeds of each arm, from 0")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="what to train; both are needed to compare")
    p.add_argument("--test", type=int, default=0, help="films to test on; 0: all")
    p.add_argument(
        "--record", type=Path, metavar="DIR", help="write the tables there too: results/e2e also into docs/papers.md"
    )
    add_run_options(p)
    group = p.add_argument_group("recipe", "of both arms alike")
    for f in fields(EndToEndRecipe):
        if f.name in OPTIONS:
            default = getattr(RECIPE, f.name)
            group.add_argument(
                "--" + f.name.replace("_", "-"), type=type(default), default=default,
                choices=SELECT if f.name == "select" else f.metadata["choices"],
                help=f.metadata["help"] + (f" ({default})" if default != "" else ""),
            )  # fmt: skip
    return p


def main() -> None:
    """Train, compare and report from the command line."""
    args = options().parse_args()
    known = [name for name in list_models() if split_name(name)[1] == "e2e"]
    if args.model not in known:
        raise SystemExit(f"{args.model!r} is no network end to end; choose one of: {', '.join(known)}.")
    if args.trials < 1 or min(args.films, args.val, args.test) < 0:
        raise SystemExit("--trials must be 1 or more, and --films, --val and --test 0 or more.")
    run, recipe = run_from(args), replace(RECIPE, **{name: getattr(args, name) for name in OPTIONS})
    every = [
        (replace(recipe, arm=arm, seed=seed), replace(run, out=f"{run.out}/{arm}/{seed}"))
        for seed in range(args.trials)
        for arm in args.arms
    ]
    for number, (one, where) in enumerate(every, 1):
        print(f"training {number} of {len(every)}: {TITLES[one.arm]}, seed {one.seed}", flush=True)
        train(one, where)
    if set(args.arms) != set(ARMS):
        return
    results = measure(every, args.test)
    write_results(results, markdown(results), Path(run.out), args.record)
    if args.record:
        write_among_papers(args.record, "e2e", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    run_verb(main)
