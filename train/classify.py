"""Train a classifier on segmented lungs (MANet, section 3.2).

The paper's recipe, on a GPU:
    python -m train.classify --data DATA --model resnet34_ma --out runs/resnet34_ma
What was done for the shipped weights: see weights/MODEL_CARD.md.
"""

import argparse

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from manet_core import CLASSES, create_classifier, list_models
from manet_core.preprocess import SEES

from . import imagenet
from .complexity import last_map
from .data import AUGMENTATIONS, LungPictures, Pictures, augmentation, draw_weights, predicted_lungs, split_by_image
from .engine import fit, parser, start_from

FADED = 1e-3  # a last map of mask attention below which a network hardly learns: see complexity.last_map


@torch.inference_mode()
def predict(net: nn.Module, dataset: LungPictures, device: torch.device, precision: str = "no") -> np.ndarray:
    """Probabilities (N, K) float32 of a classification data set, in its order."""
    out = []
    for image, mask, _ in DataLoader(dataset, 64):
        image, mask = image.to(device, memory_format=torch.channels_last), mask.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(image, mask)
        out.append(logits.float().softmax(1).cpu().numpy())
    return np.concatenate(out)


def options(description: str) -> argparse.ArgumentParser:
    """The options of a classifier's training; `train.paper` has them too."""
    p = parser(description, epochs=200, optimizer="sgd", lr=0.01, weight_decay=0.0, schedule="cosine")
    p.add_argument("--weights", default="weights", help="folder with the segmenter's weights")
    p.add_argument("--sees", choices=SEES, default="lungs", help="what is shown; all but the lungs are controls")
    p.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        default="paper",
        help="robust: also tone, resolution, JPEG, noise; style: also other sources' looks; masks: other masks",
    )
    p.add_argument(
        "--balance", type=float, default=0.0, help="0: each picture once; 1: each class of each source equally often"
    )
    p.add_argument("--imagenet", action="store_true", help="start from ImageNet weights (efficientnet_lite0 only)")
    return p


def lung_pictures(args: argparse.Namespace, split: str, augment=None) -> LungPictures:
    """The classification data set of one split ("train", "val", "test") at `args.size`."""
    pictures = Pictures(args.data, args.size, args.cache)
    if args.split == "image":
        pictures.index = split_by_image(pictures.index)
    rows = pictures.rows(split, labelled=True)
    lungs = predicted_lungs(pictures, args.weights, rows)
    return LungPictures("classify", pictures, rows, lungs, augment, args.seed, args.sees)


def train(args: argparse.Namespace) -> dict:
    """Train `args.model` as `args` say; what `fit` returns and leaves in `args.out`."""
    torch.manual_seed(args.seed)
    net = create_classifier(args.model)
    left = last_map(net, args.size)
    if left is not None and left < FADED:
        print(
            f"Attention: at {args.size} pixels at most {left:.0e} of the mask is left in the last map of {args.model}, "
            "which silences its features; expect little of it. Use a larger --size."
        )
    if args.imagenet:
        if not args.model.startswith("efficientnet_lite0"):
            raise SystemExit("--imagenet is there for efficientnet_lite0 only.")
        weights = imagenet.efficientnet_lite0()
        start_from(net, {name: w for name, w in weights.items() if not name.startswith("classifier.")})
    train_set = lung_pictures(args, "train", augmentation(30, True, args.augment))
    val_set = lung_pictures(args, "val")
    shown = train_set.pictures.index.iloc[train_set.rows]

    def loss(net: nn.Module, batch: tuple) -> Tensor:
        image, mask, label = batch
        return F.cross_entropy(net(image.to(memory_format=torch.channels_last), mask).float(), label)

    def validate(net: nn.Module, device: torch.device) -> dict[str, float]:
        probabilities = predict(net, val_set, device, args.precision)
        predicted = probabilities.argmax(1)
        true = np.maximum(probabilities[np.arange(len(predicted)), val_set.labels], 1e-12)
        return {
            "val_loss": float(-np.log(true).mean()),
            "accuracy": accuracy_score(val_set.labels, predicted),
            "macro_f1": f1_score(
                val_set.labels, predicted, average="macro", labels=range(len(CLASSES)), zero_division=0
            ),
        }

    draw = draw_weights(shown.label + " of " + shown.source, args.balance)
    return fit(args, net, train_set, loss, validate, score="accuracy", draw=draw)


def main() -> None:
    """Train one classifier from the command line."""
    p = options(__doc__)
    p.add_argument("--model", required=True, choices=list_models())
    p.add_argument(
        "--split", choices=["patient", "image"], default="patient", help="what is kept apart; see train.paper"
    )
    train(p.parse_args())


if __name__ == "__main__":
    main()
