"""Train the lung segmenter (MANet, section 3.1).

The paper's recipe, at 512 px on a GPU:
    python -m train.segment --data DATA --out runs/resunet
At 256 px, robust, and with the conventions of the annotators told apart:
    python -m train.segment --data DATA --recipe broad --out runs/resunet
What was done for the shipped weights: see weights/MODEL_CARD.md.
"""

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from manet_core import create_segmenter

from . import broad, run_verb
from .data import LungPictures, Pictures, RawPictures, draw_weights
from .engine import autocast, device_of, fit, memory_format
from .recipe import Recipe, Run, add_options, add_run_options, recipe_from, run_from
from .sources import convention_of


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """1 − soft Dice, averaged over the batch; logits and mask (B, 1, H, W), mask in {0, 1}."""
    p = logits.float().sigmoid().flatten(1)
    m = mask.flatten(1)
    return (1 - (2 * (p * m).sum(1) + 1) / (p.sum(1) + m.sum(1) + 1)).mean()


def intersection_over_union(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoU (N,) of boolean masks (N, H, W); 1 where both are empty."""
    both = (predicted & truth).sum((1, 2))
    either = (predicted | truth).sum((1, 2))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def convention(index, conventions: int) -> np.ndarray:
    """Which output of the segmenter each row of an index belongs to, (N,) int64: 0 with the lung behind the heart."""
    if conventions == 1:
        return np.zeros(len(index), np.int64)
    return (index.source.map(convention_of) == "aerated").to_numpy().astype(np.int64)


def train(recipe: Recipe, run: Run) -> dict:
    """Train the segmenter; what `fit` returns and leaves in `run.out`."""
    torch.manual_seed(recipe.seed)
    pictures = Pictures(run.data, recipe.size, run.cache)
    train_rows, val_rows = (pictures.rows(split, with_mask=True) for split in ("train", "val"))
    index = pictures.index
    on_device, device = recipe.augment == "broad", device_of(run)
    outputs = convention(index, recipe.conventions)
    if on_device:
        masks, whole = pictures.masks[train_rows][:, None], np.tile(np.float32([0, 0, 1, 1]), (len(train_rows), 1))
        train_set: Dataset = RawPictures(pictures.images[train_rows], masks, whole, outputs[train_rows, None], device)
    elif recipe.conventions > 1:
        raise SystemExit("Conventions are told apart with --augment broad only.")
    else:
        from .augment import augmentation  # not before: the broad augmentation needs no albumentations

        if recipe.augment in ("masks", "flip"):
            raise SystemExit(
                f"A segmenter is not augmented by {recipe.augment!r}: choose paper, robust, style or broad."
            )
        steps = augmentation(10, False, recipe.augment)
        train_set = LungPictures("segment", pictures, train_rows, pictures.masks, steps, recipe.seed)
    val_set = LungPictures("segment", pictures, val_rows, pictures.masks)
    sources = index.source.to_numpy()[val_rows]
    draws, layout = broad.Draws(recipe.seed, device), memory_format(recipe, device)

    def loss(net: nn.Module, batch: tuple) -> Tensor:
        if not on_device:
            image, mask = batch
            return dice_loss(net(image.to(memory_format=layout)), mask)
        image, mask, boxes, output = batch
        with torch.autocast(device.type, enabled=False):
            generator = draws.of(train_set.epoch)
            image, mask = broad.broad(image.float() / 255, mask.float(), boxes, recipe.size, generator, False)
            image = (broad.shown(image, mask, "whole") + 1) / 2
        logits = net(image.to(memory_format=layout), every_convention=True)
        return dice_loss(logits.gather(1, output[:, :, None, None].expand(-1, 1, *logits.shape[-2:])), mask)

    @torch.inference_mode()
    def validate(net: nn.Module, device: torch.device) -> dict[str, float]:
        ious, start = [], 0
        for image, mask in DataLoader(val_set, 64):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast(recipe, device)):
                logits = net(image.to(device, memory_format=torch.channels_last), every_convention=True).float().cpu()
            here = torch.from_numpy(outputs[val_rows[start : start + len(image)]])
            start += len(image)
            found = logits[torch.arange(len(image)), here].numpy() > 0
            ious.append(intersection_over_union(found, mask[:, 0].numpy() > 0))
        ious = np.concatenate(ious)
        per_source = {f"iou_{source}": float(ious[sources == source].mean()) for source in np.unique(sources)}
        return {"iou": float(np.mean(list(per_source.values()))), **per_source}

    draw = draw_weights(index.source.iloc[train_rows], index.source.iloc[train_rows], recipe.balance)
    net = create_segmenter(width=recipe.width, conventions=recipe.conventions)
    return fit(recipe, run, net, train_set, loss, validate, draw)


def main() -> None:
    """Train the segmenter from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(p)
    add_options(p, "segment")
    args = p.parse_args()
    train(recipe_from(args, "segment"), run_from(args))


if __name__ == "__main__":
    run_verb(main)
