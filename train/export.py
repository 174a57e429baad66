"""Ship a finished training: runs/NAME to weights/NAME.safetensors (fp16) and its manifest entry.

python -m train.export --run runs/resnet34_ma
"""

import argparse
import json
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from manet_core import CLASSES
from manet_core.weights import MANIFEST, read_manifest, sha256

from .data import read_index

PAPER = {
    "segment": dict(
        size=512,
        epochs=50,
        batch=64,
        optimizer="adam",
        lr=2e-4,
        weight_decay=1e-5,
        schedule="constant",
        init=None,
        balance=0.0,
    ),
    "classify": dict(
        size=512,
        epochs=200,
        batch=64,
        optimizer="sgd",
        lr=0.01,
        schedule="cosine",
        init=None,
        imagenet=False,
        augment="paper",
        balance=0.0,
    ),
}


def departures(task: str, settings: dict) -> dict[str, dict]:
    """Where `settings` differ from the paper's recipe: {option: {"paper", "here"}}."""
    return {
        option: {"paper": paper, "here": settings.get(option, paper)}
        for option, paper in PAPER[task].items()
        if settings.get(option, paper) != paper
    }


def entry(run: Path, file: Path) -> dict:
    """The manifest entry of a finished run whose weights have been written to `file`."""
    result = json.loads((run / "result.json").read_text())
    settings = result["settings"]
    task = "classify" if "model" in settings else "segment"
    index = read_index(settings["data"])
    rows = index[(index.split == "train") & (index.label.isin(CLASSES) if task == "classify" else index["mask"] != "")]
    settings = {k: v for k, v in settings.items() if k not in ("data", "weights")}
    if task == "segment":
        network = {"name": "resunet", "width": settings["width"]}
        preprocessing = {"size": settings["size"], "range": [0, 1], "input": "X-ray"}
    else:
        network = {"name": settings["model"]}
        preprocessing = {"size": settings["size"], "range": [-1, 1], "input": "X-ray × cleaned lung mask"}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "task": task,
        "file": file.name,
        "sha256": sha256(file),
        "network": network,
        "classes": list(CLASSES) if task == "classify" else ["lung"],
        "preprocessing": preprocessing | {"resize": "square, bilinear, antialiased"},
        "training": {
            "settings": settings,
            "departures_from_paper": departures(task, settings),
            "pictures": {source: int(n) for source, n in rows.source.value_counts().sort_index().items()},
            "patients": int(rows.patient.nunique()),
            "device": result["device"],
            "minutes": round(result["seconds"] / 60, 1),
            "commit": commit,
        },
        "figures": {"validation": result["validation"]},
    }


def main() -> None:
    """Export one run from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True, type=Path, help="the --out folder of a finished training")
    p.add_argument("--weights", default="weights", type=Path)
    args = p.parse_args()
    if not (args.run / "result.json").is_file():
        raise SystemExit(f"{args.run} holds no finished training: start its command again until it ends.")
    args.weights.mkdir(exist_ok=True)

    settings = json.loads((args.run / "result.json").read_text())["settings"]
    if settings.get("split") == "image":
        raise SystemExit(
            f"{args.run} was trained on a split by image, with test patients in it: it is not to be shipped."
        )
    if settings.get("sees", "lungs") != "lungs":
        raise SystemExit(f"{args.run} is a control that does not see the lungs as the page shows them: do not ship it.")
    name = settings.get("model", "resunet")
    file = args.weights / f"{name}.safetensors"
    # Running statistics stay float32: they are few, and a tiny variance would be lost in fp16.
    state = load_file(args.run / "best.safetensors")
    state = {k: v.half() if v.dtype == torch.float32 and "running_" not in k else v for k, v in state.items()}
    save_file(state, file)
    models = read_manifest(args.weights) if (args.weights / MANIFEST).exists() else {}
    models[name] = entry(args.run, file)
    (args.weights / MANIFEST).write_text(json.dumps({"models": models}, indent=2) + "\n")
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, sha256 {models[name]['sha256'][:12]}…")


if __name__ == "__main__":
    main()
