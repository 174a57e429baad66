"""Lung masks: IoU and Dice of the cleaned mask against the annotators', on each X-ray's own pixels."""

from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from manet_core import load_xray
from manet_core.lungs import predict_lungs
from manet_core.weights import load_network, read_manifest

from ..data import read_index
from ..segment import intersection_over_union
from ..shards import open_file
from .markdown import percent, table
from .statistics import bootstrap_weights, mean


def measure_masks(data: str | Path, weights: str | Path, split: str) -> pd.DataFrame:
    """The rows of `split` that have a mask, with "iou": of the cleaned mask, on the X-ray's own pixels."""
    index = read_index(data)
    index = index[(index.split == split) & (index["mask"] != "")]
    size = read_manifest(weights)["resunet"]["preprocessing"]["size"]
    segmenter = load_network(weights, "resunet", "cuda" if torch.cuda.is_available() else "cpu")
    rows, ious = iter(tqdm(zip(index.image, index["mask"]), "segmenting", len(index), unit="X-ray")), []
    while batch := list(islice(rows, 16)):
        pixels = [load_xray(open_file(image)).pixels for image, _ in batch]
        for lungs, (_, mask) in zip(predict_lungs(segmenter, pixels, size), batch):
            truth = np.asarray(Image.open(open_file(mask)).convert("1"))
            ious.append(intersection_over_union(lungs.at(truth.shape)[None], truth[None])[0])
    return index.assign(iou=np.array(ious, float))


def read_masks(rows: pd.DataFrame) -> dict:
    """n, patients, IoU and Dice of the rows that `measure_masks` returned, or of a part of them."""
    weights = bootstrap_weights(rows.patient.to_numpy())
    iou = rows.iou.to_numpy()
    return {
        "n": len(rows),
        "patients": rows.patient.nunique(),
        "iou": mean(iou, weights),
        "dice": mean(2 * iou / (1 + iou), weights),
    }


def by_source(masks: pd.DataFrame) -> dict:
    """`read_masks` of every source that has masks, and of every convention if a source has several.

    "mask_convention" is what the index says that its annotators drew; "" if it does not say.
    """
    conventions = masks.get("mask_convention", pd.Series("", masks.index))
    out = {}
    for source in sorted(masks.source.unique()):
        mine = sorted(conventions[masks.source == source].unique())
        for convention in mine:
            rows = masks[(masks.source == source) & (conventions == convention)]
            name = source if len(mine) == 1 else f"{source}, {convention or 'not said'}"
            out[name] = read_masks(rows) | {"mask_convention": convention}
    return out


def masks_table(found: dict) -> list[str]:
    """The figures of `by_source`."""
    rows = [
        [source, r["mask_convention"] or "–", percent(r["iou"]), percent(r["dice"]), r["n"]]
        for source, r in found.items()
    ]
    return table(["lungs of", "annotators' convention", "IoU, % (95 % CI)", "Dice, % (95 % CI)", "n"], rows)
