"""The three stages of guided attention (Danilov et al. 2021): how each is trained; see `train.guided`, which runs them.

Every stage leaves the whole network behind, as `engine.fit` does, in BACKBONE/SEED/STAGE.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from manet_core import create_classifier
from manet_core.tasks import get_task

from . import gain, imagenet
from .classify import class_loss, figures, predict, probabilities
from .data import LungPictures, Pictures, draw_weights, predicted_lungs
from .engine import autocast, device_of, fit, memory_format, save_weights, start_from
from .measures.statistics import even_sample
from .recipe import Recipe, Run, setting

STAGES = ("I", "II", "III")


_setting = partial(setting, paper=False)  # of which MANet's paper, to which recipes are compared, says nothing


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
        self.weights = None if weights is None else weights.double().numpy()
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
        loader = DataLoader(Subset(dataset, missing), 16, num_workers=run.workers)
        with torch.inference_mode():
            for number, (image, *_) in enumerate(tqdm(loader, f"features of {what}", unit="batch of 16")):
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast(recipe, device)):
                    features = net.forward_features(image.to(device)).float().mean((2, 3))
                kept[missing[16 * number : 16 * number + len(image)]] = features.cpu().numpy()
        kept.flush()
    return np.array(kept)


def validation(recipe: Recipe, dataset: LungPictures) -> Callable[[np.ndarray], dict[str, float]]:
    """What makes validation figures of probabilities (N, K) of a data set."""
    index, task = dataset.pictures.index.iloc[dataset.rows], get_task(recipe.task)
    groups = (index.label + " of " + index.source).to_numpy()
    return lambda predicted: figures(predicted, dataset.targets, dataset.labels, groups, task)


def weights_of_draw(recipe: Recipe, dataset: LungPictures) -> Tensor | None:
    """How often to draw each X-ray of a data set; None: all alike."""
    source = dataset.pictures.index.source.iloc[dataset.rows]
    answers = pd.Series(dataset.targets.argmax(1), source.index).map(dict(enumerate(get_task(recipe.task).classes)))
    return draw_weights(answers, source, recipe.balance, recipe.balance_classes)


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
        raise SystemExit("Attention mining trains on one device: leave accelerate launch away, or use --alpha 0.")
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
                raise SystemExit(f"There is no finished {before}: train stage {before.name} of {recipe.model} first.")
            start = before / "best.safetensors"
            recipe = replace(recipe, start=hashlib.sha256(start.read_bytes()).hexdigest()[:12])
            if recipe.stage == "II":
                recipe = replace(recipe, direct=False, alpha=0.0)
            train_network(recipe, here, start)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
