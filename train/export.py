"""Ship a finished training: runs/NAME to weights/NAME.safetensors (fp16) and its manifest entry.

    python -m train.export --run runs/resnet34_ma

    python -m train.export --onnx onnx          # all weights of the manifest as ONNX files, for other programs

Several sets of weights can share a folder, each with a manifest of its own (`--weights weights/NAME.json`) and a
`--tag` before the names of its files.
"""

import argparse
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file

from manet_core.networks.graph import OPSET, UnknownOperation, to_onnx
from manet_core.networks.registry import spec
from manet_core.tasks import NIH14, get_task
from manet_core.weights import (
    MANIFEST,
    SEGMENT,
    WeightsError,
    fingerprint,
    load_network,
    manifest_path,
    read_manifest,
    sha256,
    write_manifest,
)

from . import run_verb
from .data import of_sources, read_index
from .recipe import Recipe


def entry(run: Path, file: Path) -> dict:
    """The manifest entry of a finished run whose weights have been written to `file`."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    recipe = Recipe.of(result["settings"])
    index = read_index(result["settings"]["data"])
    if recipe.verb == "segment":
        rows = index[(index.split == "train") & (index["mask"] != "")]
        network = {"name": "resunet", "width": recipe.width}
        if recipe.conventions > 1:
            network["conventions"] = recipe.conventions
        classes, preprocessing = ["lung"], {"size": recipe.size, "range": [0, 1], "input": "X-ray"}
    else:
        task = get_task(recipe.task)
        known = index[task.column].map(task.knows)
        learnt = index.split.isin(task.splits) & known
        if recipe.findings:
            learnt |= index.split.isin(NIH14.splits) & index[NIH14.column].map(NIH14.knows)
        rows = index[learnt & of_sources(index, recipe.sources)]
        network, classes = {"name": recipe.model}, list(task.classes)
        shown = "X-ray" if recipe.sees == "whole" else "X-ray × cleaned lung mask"
        preprocessing = {"size": recipe.size, "range": [-1, 1], "input": shown, "sees": recipe.sees}
        if recipe.crop is not None:
            preprocessing |= {"working": recipe.working, "crop": recipe.crop}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "task": recipe.task,
        "file": file.name,
        "sha256": sha256(file),
        "network": network,
        "classes": classes,
        "preprocessing": preprocessing | {"resize": "square, bilinear, antialiased"},
        "training": {
            "settings": asdict(recipe),
            "departures_from_paper": recipe.departures(),
            "pictures": {source: int(n) for source, n in rows.source.value_counts().sort_index().items()},
            "patients": int(rows.patient.nunique()),
            "device": result["device"],
            "minutes": round(result["seconds"] / 60, 1),
            "commit": commit,
        },
        "figures": {"validation": result["validation"]},
    }


def _files(manifest: Path) -> set[str]:
    """The names of the files with the networks of a manifest; none where it cannot be read."""
    try:
        return {entry["file"] for entry in read_manifest(manifest).values()}
    except (WeightsError, KeyError):
        return set()


def write_onnx(weights: Path, folder: Path) -> Iterator[tuple[Path, float]]:
    """Write each network of a manifest as an ONNX file of opset `OPSET`, weights included, its batch axis free.

    A segmenter has the input `image` (B, 1, S, S) float32 in [0, 1], the whole X-ray, and the output `logits`
    (B, 1, S, S), whose sigmoid is the mask. A classifier has `image` (B, 1, S, S) float32 in [−1, 1], the segmented
    lungs, `mask` (B, 1, S, S) in [0, 1], and `logits` (B, K): divided by the manifest's temperature, their softmax
    (sigmoid, for several findings) is what the page shows.

    Yields:
        The file, and by how much ONNX Runtime's logits differ from PyTorch's at most, over the largest of these.

    Raises:
        UnknownOperation: a network cannot be written so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, known in read_manifest(weights).items():
        net, size = load_network(weights, name), known["preprocessing"]["size"]
        shapes = {"image": (1, size, size)} | ({} if known["task"] == SEGMENT else {"mask": (1, size, size)})
        model = to_onnx(net.forward, shapes, ["logits"])
        model.producer_name = f"MANet {name}, weights {fingerprint(known)}"
        path = folder / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
        inputs = {key: torch.rand(3, *shape) for key, shape in shapes.items()}
        with torch.inference_mode():
            expected = net(*inputs.values()).numpy()
        taken = {known.name: inputs[known.name].numpy() for known in session.get_inputs()}
        (found,) = session.run(["logits"], taken)
        yield path, float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    """Export one run, or all weights as ONNX files, from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="the --out folder of a finished training")
    what.add_argument("--onnx", type=Path, metavar="DIR", help="folder for ONNX files of all weights of the manifest")
    p.add_argument("--weights", default="weights", type=Path, help="folder, or a manifest file in it")
    p.add_argument("--tag", help="put before the file's name; default: the manifest's name, nothing for manifest.json")
    args = p.parse_args()
    if args.onnx is not None:
        try:
            for path, difference in write_onnx(args.weights, args.onnx):
                print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opset {OPSET}, {difference:.0e} from PyTorch")
        except UnknownOperation as error:
            raise SystemExit(f"A network of {args.weights} cannot be written as ONNX: {error}.") from None
        return
    if not (args.run / "result.json").is_file():
        raise SystemExit(f"{args.run} holds no finished training: start its command again until it ends.")
    manifest = manifest_path(args.weights)
    manifest.parent.mkdir(exist_ok=True)

    recipe = Recipe.of(json.loads((args.run / "result.json").read_text(encoding="utf-8"))["settings"])
    if recipe.split == "image":
        raise SystemExit(
            f"{args.run} was trained on a split by image, with test patients in it: it is not to be shipped."
        )
    if recipe.verb == "classify" and recipe.sees != spec(recipe.model).sees:
        raise SystemExit(f"{args.run} is a control that is shown something else than the page shows: do not ship it.")
    name = "resunet" if recipe.verb == "segment" else recipe.model
    tag = args.tag if args.tag is not None else "" if manifest.name == MANIFEST else manifest.stem
    file = manifest.with_name(f"{tag}.{name}.safetensors".removeprefix("."))
    for other in manifest.parent.glob("*.json"):
        if other != manifest and file.name in _files(other):
            raise SystemExit(
                f"{file} belongs to {other}: choose another --tag, or a manifest of your own by --weights."
            )
    models = read_manifest(manifest) if manifest.exists() else {}
    start = sha256(Path(recipe.init)) if recipe.init and Path(recipe.init).is_file() else None
    before = models.get(name, {})
    # Running statistics stay float32: they are few, and a tiny variance would be lost in fp16.
    state = load_file(args.run / "best.safetensors")
    state = {k: v.half() if v.dtype == torch.float32 and "running_" not in k else v for k, v in state.items()}
    save_file(state, file)
    models[name] = entry(args.run, file)
    if start and start == before.get("sha256"):  # it went on from the weights that it replaces
        models[name]["training"]["before"] = before["training"]
    write_manifest(manifest, models)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, sha256 {models[name]['sha256'][:12]}…")


if __name__ == "__main__":
    run_verb(main)
