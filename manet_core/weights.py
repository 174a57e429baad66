"""Shipped weights: safetensors files and the manifest that says what each of them is.

`manifest.json` maps a model's name to its file, sha256, network, classes,
preprocessing, training and figures; and to a second, small file if its last
layer was refitted after training. Nothing is loaded whose hash differs.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .networks.registry import create_classifier, create_segmenter

MANIFEST = "manifest.json"


class WeightsError(RuntimeError):
    """Weights that are missing or damaged; its text is one sentence that says which and what to do."""


def read_manifest(folder: str | Path) -> dict[str, dict]:
    """Entries of `folder`/manifest.json by model name.

    Raises:
        WeightsError: there is no manifest, or it cannot be read.
    """
    path = Path(folder) / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))["models"]
    except FileNotFoundError:
        raise WeightsError(
            f"There are no weights in {folder}: {MANIFEST} is missing; "
            "clone the repository whole, or train them as the README says."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(f"{path} is damaged; restore it from the repository.") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(entry: dict) -> str:
    """What a manifest entry loads: the SHA-256 of its file, and after a "+" that of its refitted last layer, if any."""
    return "+".join(part["sha256"] for part in (entry, entry.get("last_layer")) if part)


def verified(folder: str | Path, entry: dict) -> Path:
    """The path of the file that a manifest entry names, once its hash has been found right.

    Raises:
        WeightsError: the file is missing, or not the one that the manifest describes.
    """
    path = Path(folder) / Path(entry["file"]).name
    if not path.is_file():
        raise WeightsError(f"{path} is missing; restore it from the repository, or train it as the README says.")
    if sha256(path) != entry["sha256"]:
        raise WeightsError(
            f"{path} is damaged or not the file that the manifest names; restore it from the repository."
        )
    return path


def load_network(folder: str | Path, name: str, device: str | torch.device = "cpu", refitted: bool = True) -> nn.Module:
    """The network `name` of the manifest in `folder`, float32, in evaluation mode.

    Args:
        folder: with manifest.json.
        name: of a model in the manifest.
        device: where to put the network.
        refitted: with the last layer that `train.refit` made, where there is one; False: as it was trained.

    Raises:
        WeightsError: it is not in the manifest, its file is missing, or the file
            is not the one that the manifest describes.
    """
    entries = read_manifest(folder)
    if name not in entries:
        raise WeightsError(f"There are no weights for {name!r} in {folder}; there are: {', '.join(entries)}.")
    entry = entries[name]
    path = verified(folder, entry)
    state = load_file(path)
    if refitted and "last_layer" in entry:
        state |= load_file(verified(folder, entry["last_layer"]))
    options = dict(entry["network"])
    kind = options.pop("name")
    if entry["task"] == "segment":
        net = create_segmenter(kind, **options)
    else:
        net = create_classifier(kind, num_classes=len(entry["classes"]), **options)
    try:
        net.load_state_dict(
            {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        )
    except RuntimeError:
        raise WeightsError(
            f"{path} does not fit the network {kind!r}; the weights and the program are of different versions."
        ) from None
    return net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
