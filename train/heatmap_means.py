"""The mean heatmap of each class by each network, over validation X-rays: what one film's heatmap is compared with.

    python -m train.heatmap_means --data DATA

reads --films validation X-rays as the page does, and writes
weights/heatmaps.safetensors, 28×28 values a mean, and names it in the manifest.
A class on fewer than 100 of whose heatmaps there is any evidence has no mean, so
that no film can be told from one.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from manet_core import Analysis, Pipeline
from manet_core.heatmap_means import PART, HeatmapMean, alike, small
from manet_core.weights import SEGMENT, fingerprint, manifest_path, read_manifest, sha256, write_manifest

from . import run_verb
from .data import read_index
from .measures.study import options
from .shards import open_file

FEWEST = 100  # heatmaps of a mean


def means(analyses: Iterable[Analysis]) -> dict[str, dict[str, HeatmapMean]]:
    """{network: {class: mean}} of the heatmaps in which there is any evidence, where there are `FEWEST` of them."""
    maps = {}
    for analysis in analyses:
        for name, reading in analysis.readings.items():
            for label, heatmap in reading.heatmaps.items():
                found = maps.setdefault(name, {}).setdefault(label, [])
                if reading.peaks[label] > 0:
                    found.append(small(heatmap))
    return {
        name: {label: _mean(np.stack(found)) for label, found in classes.items() if len(found) >= FEWEST}
        for name, classes in maps.items()
    }


def _mean(maps: np.ndarray) -> HeatmapMean:
    mean = maps.mean(0)
    return HeatmapMean(mean, len(maps), float(np.median([alike(one, mean) or 0.0 for one in maps])))


def main() -> None:
    """Average, and write weights/heatmaps.safetensors."""
    p = options(__doc__)
    p.add_argument("--films", type=int, default=240, help="validation X-rays, drawn at random (default: %(default)s)")
    args = p.parse_args()
    index = read_index(args.data)
    images = index.image[index.split == "val"].to_numpy()
    if len(images) < FEWEST:
        raise SystemExit(f"{args.data} has {len(images)} validation X-rays; a mean needs {FEWEST}.")
    drawn = np.random.default_rng(0).permutation(images)[: args.films]
    pipeline, models = Pipeline.load(args.weights), read_manifest(args.weights)
    found = means(tqdm(pipeline.analyze_many(open_file(image) for image in drawn), "reading", len(drawn), unit="X-ray"))
    found = {name: classes for name, classes in found.items() if classes}
    if not found:
        raise SystemExit(
            f"No network found evidence for a class on {FEWEST} of {len(drawn)} X-rays; give more --films."
        )
    (segmenter,) = (entry for entry in models.values() if entry["task"] == SEGMENT)
    path = manifest_path(args.weights).with_name(Path(segmenter["file"]).name.replace("resunet", "heatmaps"))
    arrays = {name: np.stack([of.mean for of in classes.values()]) for name, classes in found.items()}
    save_file({name: array.astype(np.float16) for name, array in arrays.items()}, path)
    for entry in models.values():
        entry.pop(PART, None)
    for name, classes in found.items():
        models[name][PART] = {
            "file": path.name,
            "sha256": sha256(path),
            "of": fingerprint(models[name]),
            "segmenter": fingerprint(segmenter),
            "films": {label: of.films for label, of in classes.items()},
            "alike": {label: round(of.alike, 3) for label, of in classes.items()},
        }
    write_manifest(args.weights, models)
    for name, classes in found.items():
        told = ", ".join(f"{label} {of.alike:.2f} ({of.films})" for label, of in classes.items())
        print(f"{name}: median correlation with the mean (X-rays): {told}")


if __name__ == "__main__":
    run_verb(main)
