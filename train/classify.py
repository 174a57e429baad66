"""Train a classifier on segmented lungs (MANet, section 3.2).

The paper's recipe, on a GPU:
    python -m train.classify --data DATA --model resnet34_ma --out runs/resnet34_ma
Several hospitals a class, from weights that know the findings of chest X-rays:
    python -m train.classify --data DATA --recipe broad --task nih14 --imagenet --model efficientnet_lite0 \\
        --select auroc --out runs/nih14
    python -m train.classify --data DATA --recipe broad --init runs/nih14/best.safetensors \\
        --model efficientnet_lite0_ma --out runs/efficientnet_lite0_ma
What was done for the shipped weights: see weights/MODEL_CARD.md.
"""

import argparse
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from manet_core import create_classifier, list_models
from manet_core.networks.registry import spec
from manet_core.tasks import Task, get_task, list_tasks

from . import broad, findings, imagenet, run_verb
from .complexity import last_map
from .data import LungPictures, RawPictures, draw_weights, lung_pictures
from .engine import autocast, device_of, fit, memory_format, start_from
from .recipe import Recipe, Run, add_options, add_run_options, recipe_from, run_from

FADED = 1e-3  # a last map of mask attention below which a network hardly learns: see complexity.last_map


def class_loss(logits: Tensor, target: Tensor, task: Task, smoothing: float = 0.0) -> Tensor:
    """Mean loss of a batch.

    Exclusive: −log of the probability that the label leaves, p(a) + p(b) where it says "a or b"; with cross entropy
    towards all classes alike for the share `smoothing`. Otherwise binary cross entropy of the labels that are known.

    Args:
        logits: (B, K).
        target: (B, K), see `Task.target`.
    """
    logits = logits.float()
    if not task.exclusive:
        known = ~target.isnan()
        return F.binary_cross_entropy_with_logits(logits[known], target[known])
    logs = logits.log_softmax(1)
    allowed = torch.logsumexp(logs.masked_fill(target == 0, -torch.inf), 1)
    return -((1 - smoothing) * allowed + smoothing * logs.mean(1)).mean()


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """(B, K) of logits (B, K): softmax of exclusive classes, sigmoid of others."""
    return logits.softmax(1) if task.exclusive else logits.sigmoid()


@torch.inference_mode()
def predict(
    net: nn.Module,
    dataset: LungPictures | list[tuple],
    device: torch.device,
    bf16: bool = False,
    asked: Task | None = None,
) -> np.ndarray:
    """Probabilities (N, K) float32 of a classification data set, in its order."""
    out = []
    for image, mask, _ in DataLoader(dataset, 64):
        image, mask = image.to(device, memory_format=torch.channels_last), mask.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = net(image, mask)
        out.append(probabilities(logits.float(), asked or get_task("manet")).cpu().numpy())
    return np.concatenate(out)


def group_sensitivity(right: np.ndarray, groups: np.ndarray, least: int = 10) -> float:
    """Mean over groups (N,) of the share of `right` (N,) in each.

    Groups of fewer than `least` X-rays are left out, as a single one would move the mean; if all are, all count.
    """
    names, counts = np.unique(groups, return_counts=True)
    counted = names[counts >= least] if (counts >= least).any() else names
    return float(np.mean([right[groups == name].mean() for name in counted]))


def figures(predicted: np.ndarray, targets: np.ndarray, labels: np.ndarray, groups: np.ndarray, task: Task) -> dict:
    """Validation figures of probabilities (N, K).

    Args:
        predicted: (N, K).
        targets: (N, K), see `Task.target`.
        labels: (N,) class numbers; −1 where the label is partial.
        groups: (N,) label and source of each.

    Returns:
        Exclusive: val_loss, accuracy and macro_f1 of the full labels, and group_sensitivity, in which any class that
        a partial label allows is right. Otherwise: val_loss and auroc, the mean over findings.
    """
    if not task.exclusive:
        p = np.clip(predicted, 1e-7, 1 - 1e-7)
        loss = -np.nanmean(targets * np.log(p) + (1 - targets) * np.log(1 - p))
        both = [k for k in range(len(task.classes)) if 0 < targets[:, k].mean() < 1]
        aurocs = [roc_auc_score(targets[:, k], predicted[:, k]) for k in both]
        return {"val_loss": float(loss), "auroc": float(np.mean(aurocs)) if aurocs else 0.5}
    answer, full = predicted.argmax(1), labels >= 0
    allowed = np.maximum((predicted * targets).sum(1), 1e-12)
    return {
        "val_loss": float(-np.log(allowed).mean()),
        "accuracy": accuracy_score(labels[full], answer[full]),
        "macro_f1": f1_score(
            labels[full], answer[full], average="macro", labels=range(len(task.classes)), zero_division=0
        ),
        "group_sensitivity": group_sensitivity(targets[np.arange(len(answer)), answer] > 0, groups),
    }


def raw_pictures(dataset: LungPictures, device: torch.device) -> RawPictures:
    """The X-rays of a data set for `train.broad`, kept on `device`."""
    images, masks = (
        np.stack([array[row] for row in dataset.rows]) for array in (dataset.pictures.images, dataset.lungs)
    )
    boxes = np.array([dataset.view.box(mask) for mask in masks], np.float32)
    return RawPictures(images, masks[:, None], boxes, dataset.targets, device)


def train(recipe: Recipe, run: Run) -> dict:
    """Train `recipe.model`; what `fit` returns and leaves in `run.out`."""
    torch.manual_seed(recipe.seed)
    task, device = get_task(recipe.task), device_of(run)
    if recipe.findings and not (task.exclusive and 0 < recipe.findings < 1):
        raise SystemExit("--findings takes a share between 0 and 1, and only beside a task with one answer.")
    net = create_classifier(recipe.model, num_classes=len(task.classes))
    left = last_map(net, recipe.size)
    if left is not None and left < FADED:
        print(
            f"Attention: at {recipe.size} pixels at most {left:.0e} of the mask is left in the last map of "
            f"{recipe.model}, which silences its features; expect little of it. Use a larger --size."
        )
    if recipe.imagenet and spec(recipe.model).attention == "guided":
        start_from(net.body, imagenet.guided_body(spec(recipe.model).backbone))
    elif recipe.imagenet:
        if not recipe.model.startswith("efficientnet_lite0"):
            raise SystemExit("--imagenet is there for efficientnet_lite0 only.")
        weights = imagenet.efficientnet_lite0()
        start_from(net, {name: w for name, w in weights.items() if not name.startswith("classifier.")})
    on_device, steps = recipe.augment == "broad", None
    if not on_device:
        from .augment import augmentation  # not before: the broad augmentation needs no albumentations

        steps = augmentation(30, True, recipe.augment)
    train_set = lung_pictures(recipe, run, *task.splits, task=task, augment=steps)
    val_set = lung_pictures(recipe, run, "val", task=task)
    shown = train_set.pictures.index.iloc[train_set.rows]
    index = val_set.pictures.index.iloc[val_set.rows]
    groups = (index.label + " of " + index.source).to_numpy()
    draw = draw_weights(shown.label, shown.source, recipe.balance, recipe.balance_classes) if task.exclusive else None
    if recipe.findings:
        findings.add_outputs(net, load_file(recipe.init) if recipe.init else None)
        train_set, draw = findings.add_pictures(train_set, recipe, run, draw)
    shown_set: Dataset = raw_pictures(train_set, device) if on_device else train_set
    held = list(val_set) if on_device else val_set  # decoded once, as they do not change
    draws, layout = broad.Draws(recipe.seed, device), memory_format(recipe, device)
    of_class = partial(class_loss, task=task, smoothing=recipe.label_smoothing)

    def loss(net: nn.Module, batch: tuple) -> Tensor:
        if on_device:
            images, masks, boxes, target = batch
            with torch.autocast(device.type, enabled=False):
                generator = draws.of(shown_set.epoch)
                images, masks = broad.broad(images.float() / 255, masks.float(), boxes, recipe.size, generator)
                images = broad.shown(images, masks, recipe.sees)
        else:
            images, masks, target = batch
        logits = net(images.to(memory_format=layout), masks)
        return findings.joint_loss(logits, target, of_class) if recipe.findings else of_class(logits, target)

    def validate(net: nn.Module, device: torch.device) -> dict[str, float]:
        predicted = predict(net, held, device, autocast(recipe, device), task)
        return figures(predicted, val_set.targets, val_set.labels, groups, task)

    return fit(recipe, run, net, shown_set, loss, validate, draw, findings.kept)


def options(description: str) -> argparse.ArgumentParser:
    """The options of a classifier's training."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(p)
    add_options(p, "classify")
    return p


def main() -> None:
    """Train one classifier from the command line."""
    args = options(__doc__).parse_args()
    for name, known in (("model", list_models()), ("task", list_tasks())):
        if getattr(args, name) not in (None, *known):
            raise SystemExit(f"There is no {name} {getattr(args, name)!r}; choose one of: {', '.join(known)}.")
    train(recipe_from(args, "classify"), run_from(args))


if __name__ == "__main__":
    run_verb(main)
