"""Train the lung segmenter (MANet, section 3.1).

The paper's recipe, at 512 px on a GPU:
    python -m train.segment --data DATA --out runs/resunet --size 512
What a CPU can do in half an hour: see weights/MODEL_CARD.md.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from manet_core import create_segmenter

from .data import LungPictures, Pictures, augmentation, draw_weights
from .engine import fit, parser


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


def main() -> None:
    """Train the segmenter from the command line."""
    p = parser(__doc__, epochs=50, optimizer="adam", lr=2e-4, weight_decay=1e-5, schedule="constant")
    p.add_argument("--width", type=int, default=32, help="channels of the first level")
    p.add_argument("--balance", type=float, default=0.0, help="0: each picture once; 1: each source equally often")
    args = p.parse_args()
    torch.manual_seed(args.seed)

    pictures = Pictures(args.data, args.size, args.cache)
    train_rows, val_rows = (pictures.rows(split, with_mask=True) for split in ("train", "val"))
    train_set = LungPictures("segment", pictures, train_rows, pictures.masks, augmentation(10, False), args.seed)
    val_set = LungPictures("segment", pictures, val_rows, pictures.masks)
    sources = pictures.index.source.to_numpy()[val_rows]

    def loss(net: nn.Module, batch: tuple) -> Tensor:
        image, mask = batch
        return dice_loss(net(image.to(memory_format=torch.channels_last)), mask)

    @torch.inference_mode()
    def validate(net: nn.Module, device: torch.device) -> dict[str, float]:
        ious = []
        for image, mask in DataLoader(val_set, 64):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                logits = net(image.to(device, memory_format=torch.channels_last))
            ious.append(intersection_over_union((logits[:, 0] > 0).cpu().numpy(), mask[:, 0].numpy() > 0))
        ious = np.concatenate(ious)
        per_source = {f"iou_{source}": float(ious[sources == source].mean()) for source in np.unique(sources)}
        return {"iou": float(np.mean(list(per_source.values()))), **per_source}

    draw = draw_weights(pictures.index.source.iloc[train_rows], args.balance)
    fit(args, create_segmenter(width=args.width), train_set, loss, validate, score="iou", draw=draw)


if __name__ == "__main__":
    main()
