"""Guided attention in three stages (Danilov et al. 2021): the frozen body, the whole network, the lung mask.

    python -m train.guided --data DATA --out runs/guided --imagenet

trains what is missing below --out, BACKBONE/SEED/STAGE, goes on with what was interrupted, skips what is finished, and
writes results/guided/tables.md and results.json.

Stage I trains the paper's head on the features of a frozen body, which are computed once and kept in --cache. The
--best backbones by validation accuracy go on: stage II trains body and head, stage III multiplies the body's features by
the lung mask (direct guidance) and adds attention mining to the loss (indirect, `train.gain`),
L = L_clas + α L_attn. Each stage starts from the best epoch of the one before.

SGD has momentum 0.9, as MANet's: the paper is silent, and at its learning rate of 1e-4 a network without momentum
hardly moves. The X-rays of stages II and III are augmented as MANet's. `--steps` shortens an epoch, and epochs then go
through all X-rays in turn.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from manet_core import create_classifier, list_models
from manet_core.networks.registry import spec
from manet_core.tasks import GUIDED, get_task

from . import gain, imagenet, run_verb
from .classify import class_loss, figures, predict, probabilities
from .data import LungPictures, Pictures, draw_weights, predicted_lungs
from .engine import autocast, device_of, fit, memory_format, save_weights, start_from
from .measures.classification import read_test
from .measures.heatmaps import heatmap, in_lung
from .measures.localisation import localise, read_lesions
from .measures.markdown import number, percent, table
from .measures.statistics import bootstrap_weights, even_sample, mean, proportion
from .measures.study import NotMeasured
from .recipe import Recipe, Run, add_options, add_run_options, recipe_from, run_from

STAGES = ("I", "II", "III")
BACKBONES = tuple(name.removesuffix("_guided") for name in list_models() if name.endswith("_guided"))
PAPERS_TEN = tuple(name for name in BACKBONES if name != "efficientnet_lite0")


def _setting(default, help: str):
    """A field whose option has this help."""
    return field(default=default, metadata={"help": help, "choices": None, "paper": False})


@dataclass(frozen=True)
class GuidedRecipe(Recipe):
    """A stage's recipe: also what only guided attention has."""

    stage: str = _setting("I", "of the paper's three")
    start: str = _setting("", "SHA-256 of the weights that the stage before left, its first 12 digits")
    steps: int = _setting(0, "stages II and III: batches an epoch, 0: all X-rays")
    chosen_on: int = _setting(
        0, "stages II and III: validation X-rays that choose the epoch, even over classes, 0: all"
    )
    direct: bool = _setting(True, "stage III: the lung mask multiplies the features")
    alpha: float = _setting(1.0, "stage III: α, the weight of the attention's loss; 0: none")
    omega: float = _setting(gain.OMEGA, "stage III: ω, how sharp the attention's threshold is")
    sigma: float = _setting(gain.SIGMA, "stage III: σ, where it lies, of a map scaled to [0, 1]")

    @property
    def backbone(self) -> str:
        """The model's name without its attention."""
        return self.model.removesuffix("_guided")


OWN = tuple(f for f in fields(GuidedRecipe) if f.name not in {g.name for g in fields(Recipe)})


class EachEpoch(Dataset):
    """As many items of another set in each epoch as are asked for; set the attribute `epoch` before each.

    Args:
        whole: the set, which reads its own attribute `epoch`.
        count: items an epoch. Epochs go through all of them in turn, in an order of its own for each passage.
        seed: of the draws.
        weights: (len(whole),) to draw with replacement in proportion to; None: in turn.
    """

    def __init__(self, whole: Dataset, count: int, seed: int, weights: Tensor | None = None):
        self.whole, self.count, self.seed = whole, count, seed
        self.weights = None if weights is None else (weights / weights.sum()).numpy().astype(np.float64)
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """Which epoch's items these are."""
        return self.whole.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.whole.epoch, self.items = epoch, self.drawn(epoch)

    def drawn(self, epoch: int) -> np.ndarray:
        """The items (count,) of an epoch."""
        size = len(self.whole)
        if self.weights is not None:
            p = self.weights / self.weights.sum()
            return np.random.default_rng((self.seed, epoch)).choice(size, self.count, p=p)
        places = np.arange(epoch * self.count, (epoch + 1) * self.count)
        orders = {turn: np.random.default_rng((self.seed, turn)).permutation(size) for turn in set(places // size)}
        return np.array([orders[place // size][place % size] for place in places])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> tuple:
        return self.whole[self.items[item]]


class Features(Dataset):
    """Frozen features (N, C) with their targets (N, K), a batch at a time as [(B, C, 1, 1), (B, K)]."""

    def __init__(self, features: np.ndarray, targets: np.ndarray, device: torch.device):
        self.epoch = 0
        self.features = torch.from_numpy(features)[:, :, None, None].to(device)
        self.targets = torch.from_numpy(targets).to(device)

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, items: list[int]) -> list[Tensor]:
        chosen = torch.tensor(items, device=self.features.device)
        return [self.features[chosen], self.targets[chosen]]


def xrays(
    recipe: Recipe, run: Run, *splits: str, rows: np.ndarray | None = None, masks: bool = False, augment=None
) -> LungPictures:
    """The X-rays of `splits`, or at `rows`, as a stage shows them.

    Args:
        masks: with the predicted lungs. Otherwise the masks mean nothing, which costs no segmentation.
    """
    task, pictures = get_task(recipe.task), Pictures(run.data, recipe.size, run.cache)
    rows = pictures.rows(*splits, task=task) if rows is None else rows
    lungs = predicted_lungs(pictures, run.weights, rows) if masks else pictures.masks
    return LungPictures("classify", pictures, rows, lungs, augment, recipe.seed, recipe.sees, task)


def fresh_network(recipe: GuidedRecipe) -> nn.Module:
    """The network before stage I: a random head, and a body of ImageNet or random weights; without guidance."""
    torch.manual_seed(recipe.seed)
    net = create_classifier(recipe.model, num_classes=len(get_task(recipe.task).classes))
    if recipe.imagenet:
        start_from(net.body, imagenet.guided_body(recipe.backbone))
    net.guidance.fill_(False)
    return net


def trained_network(recipe: GuidedRecipe, weights: Path) -> nn.Module:
    """The network of a finished stage, in evaluation mode."""
    net = create_classifier(recipe.model, num_classes=len(get_task(recipe.task).classes))
    net.load_state_dict(load_file(weights))
    return net.eval()


def frozen_features(recipe: GuidedRecipe, run: Run, net: nn.Module, dataset: LungPictures, what: str) -> np.ndarray:
    """GAP of the body's features of a data set that is not augmented: (N, C) float32.

    They are kept in `run.cache` as they come, and computed once for each body.
    """
    found = hashlib.sha256(json.dumps([recipe.sees, recipe.size, dataset.rows.tolist()]).encode())
    for tensor in net.body.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    path = Path(run.cache) / f"{dataset.pictures.stem}-{recipe.model}-{found.hexdigest()[:12]}.npy"
    shape = (len(dataset), net.body.num_features)
    if not path.exists():
        part = path.with_suffix(".part")
        np.lib.format.open_memmap(part, "w+", np.float32, shape)[:] = np.nan
        part.rename(path)
    kept = np.load(path, mmap_mode="r+")
    missing = np.flatnonzero(np.isnan(kept[:, 0]))
    if len(missing):
        device = device_of(run)
        net = net.eval().to(device)
        loader = DataLoader(torch.utils.data.Subset(dataset, missing), 16, num_workers=run.workers)
        with torch.inference_mode():
            for number, (image, *_) in enumerate(tqdm(loader, f"features of {what}", unit="batch of 16")):
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast(recipe, device)):
                    features = net.forward_features(image.to(device)).float().mean((2, 3))
                kept[missing[16 * number : 16 * number + len(image)]] = features.cpu().numpy()
        kept.flush()
    return np.array(kept)


def validation(recipe: Recipe, dataset: LungPictures) -> Callable[[np.ndarray], dict[str, float]]:
    """Figures of probabilities (N, K) of a data set; "log_likelihood" is −val_loss, whose highest value is the best."""
    index = dataset.pictures.index.iloc[dataset.rows]
    groups = (index.label + " of " + index.source).to_numpy()
    task = get_task(recipe.task)

    def measured(predicted: np.ndarray) -> dict[str, float]:
        found = figures(predicted, dataset.targets, dataset.labels, groups, task)
        return found | {"log_likelihood": -found["val_loss"]}

    return measured


def weights_of_draw(recipe: Recipe, dataset: LungPictures) -> Tensor | None:
    """How often to draw each X-ray of a data set; None: all alike."""
    shown = dataset.pictures.index.iloc[dataset.rows]
    return draw_weights(shown.label, shown.source, recipe.balance, recipe.balance_classes)


def train_head(recipe: GuidedRecipe, run: Run) -> None:
    """Stage I: leaves the whole network in `run.out`, as `fit` does, and its work in `run.out`/head."""
    task, device, out = get_task(recipe.task), device_of(run), Path(run.out)
    net = fresh_network(recipe)
    shown, held = xrays(recipe, run, "train"), xrays(recipe, run, "val")
    train_set = Features(frozen_features(recipe, run, net, shown, "train"), shown.targets, device)
    val_set = Features(frozen_features(recipe, run, net, held, "val"), held.targets, device)
    measured = validation(recipe, held)

    def loss(head: nn.Module, batch: list[Tensor]) -> Tensor:
        return class_loss(head(batch[0]), batch[1], task, recipe.label_smoothing)

    @torch.inference_mode()
    def validate(head: nn.Module, device: torch.device) -> dict[str, float]:
        return measured(probabilities(head(val_set.features).float(), task).cpu().numpy())

    fit(
        recipe, replace(run, out=str(out / "head")), net.head, train_set, loss, validate, weights_of_draw(recipe, shown)
    )
    net.head.load_state_dict(load_file(out / "head" / "best.safetensors"))
    save_weights(net, out / "best.safetensors")
    for name in ("settings.json", "log.csv", "result.json"):  # the last says that all is there
        (out / name).write_bytes((out / "head" / name).read_bytes())


def train_network(recipe: GuidedRecipe, run: Run, start: Path) -> None:
    """Stages II and III, from the weights `start`: leaves in `run.out` what `fit` does."""
    from .augment import augmentation  # not before: stage I needs no albumentations

    task, device = get_task(recipe.task), device_of(run)
    torch.manual_seed(recipe.seed)
    net = create_classifier(recipe.model, num_classes=len(task.classes))
    net.load_state_dict(load_file(start))
    net.guidance.fill_(recipe.direct)
    shown = xrays(recipe, run, "train", augment=augmentation(30, True))
    count = recipe.steps * recipe.batch or len(shown)
    train_set = EachEpoch(shown, count, recipe.seed, weights_of_draw(recipe, shown))
    rows = shown.pictures.rows("val", task=task)
    if recipe.chosen_on:
        index = shown.pictures.index.iloc[rows]
        rows = rows[even_sample(index.label.to_numpy(), index.source.to_numpy(), n=recipe.chosen_on)]
    held = xrays(recipe, run, rows=rows, masks=recipe.direct)
    if recipe.direct:
        drawn = np.unique(np.concatenate([train_set.drawn(epoch) for epoch in range(recipe.epochs)]))
        shown.lungs = predicted_lungs(shown.pictures, run.weights, shown.rows[drawn])
    measured, layout = validation(recipe, held), memory_format(recipe, device)

    def loss(model: nn.Module, batch: tuple) -> Tensor:
        image, mask, target = batch
        return objective(recipe, model, image.to(memory_format=layout), mask, target)

    def validate(net: nn.Module, device: torch.device) -> dict[str, float]:
        return measured(predict(net, held, device, autocast(recipe, device), task))

    fit(recipe, run, net, train_set, loss, validate)


def objective(recipe: GuidedRecipe, net: nn.Module, image: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """L = L_clas + α L_attn of a batch; without α, L_clas and nothing else is computed.

    Args:
        net: a network, not one that is shared by several GPUs, which would have to wrap its every call.
        image: (B, C, H, W) float in [−1, 1].
        mask: (B, 1, H, W) float in [0, 1].
        target: (B, K) float, 1 for the true class.
    """
    task = get_task(recipe.task)
    if not recipe.alpha:
        return class_loss(net(image, mask), target, task, recipe.label_smoothing)
    if not hasattr(net, "forward_features"):
        raise SystemExit(
            "Attention mining trains on one device: start it without accelerate launch, or with --alpha 0."
        )
    features = net.forward_features(image, mask)
    logits = net.forward_head(features)
    left = gain.remaining(net, image, mask, features, logits, target.argmax(1), recipe.omega, recipe.sigma)
    return class_loss(logits, target, task, recipe.label_smoothing) + recipe.alpha * left.mean()


def stage_folder(out: Path, recipe: GuidedRecipe) -> Path:
    """Where a stage of a training lies."""
    return out / recipe.backbone / str(recipe.seed) / recipe.stage


def train_stage(recipe: GuidedRecipe, run: Run) -> dict:
    """Train a stage below `run.out` unless it is finished; the content of its result.json.

    Raises:
        SystemExit: the stage before is not finished.
    """
    folder = stage_folder(Path(run.out), recipe)
    if not (folder / "result.json").exists():
        print(f"{recipe.model}, seed {recipe.seed}: stage {recipe.stage}", flush=True)
        here = replace(run, out=str(folder))
        if recipe.stage == "I":
            train_head(replace(recipe, direct=False, alpha=0.0, steps=0, chosen_on=0), here)
        else:
            before = folder.with_name(STAGES[STAGES.index(recipe.stage) - 1])
            if not (before / "result.json").exists():
                raise SystemExit(
                    f"{before} holds no finished stage: train stage {before.name} of {recipe.model} first."
                )
            start = before / "best.safetensors"
            recipe = replace(recipe, start=hashlib.sha256(start.read_bytes()).hexdigest()[:12])
            if recipe.stage == "II":
                recipe = replace(recipe, direct=False, alpha=0.0)
            train_network(recipe, here, start)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


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
        out["before"].append(float(logits.softmax(1)[0, label]))
        out["after"].append(float(gain.remaining(net, image, mask, features, logits, true, omega, sigma)))
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
    return localise(heats, lungs, outlines, patients) | {"patients": len(set(patients))} if heats else None


def measure_stage(recipe: GuidedRecipe, run: Run, folder: Path, heatmaps: int) -> dict:
    """All that the tables say of a finished stage; kept in its folder, as long as its weights are the same."""
    weights, kept = folder / "best.safetensors", folder / "measured.json"
    asked = {"weights": hashlib.sha256(weights.read_bytes()).hexdigest(), "heatmaps": heatmaps}
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
    """Where a row stands: by backbone, seed, stage."""
    return BACKBONES.index(row["backbone"]), row["seed"], STAGES.index(row["stage"])


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
    if row["stage"] == "III":
        trained += f"; α {recipe['alpha']:g}" + ("" if recipe["direct"] else ", mask not multiplied")
    return [f"{spec(recipe['model']).title} at {recipe['size']}", row["stage"], trained]


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


def report(rows: list[dict], folder: Path) -> None:
    """Write results.json and tables.md; stages that `folder` holds of other trainings stay in them."""
    path = folder / "results.json"
    new = {row_key(row) for row in rows}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = sorted([*rows, *(row for row in kept if row_key(row) not in new)], key=row_key)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / "tables.md").write_text(markdown(rows), encoding="utf-8")


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
    left_out = (
        "task",
        "model",
        "init",
        "augment",
        "working",
        "crop",
        "sees",
        "split",
        "width",
        "conventions",
        "sources",
    )
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
