"""Shipped weights: safetensors files and the manifest that says what each of them is.

`manifest.json` maps a model's name to its task, file, sha256, network,
preprocessing, training, figures, temperature and operating point; and to a second,
small file if its last layer was refitted after training. Nothing is loaded whose hash differs.
Wherever `weights` is asked for, it is a folder with `manifest.json`, or another
manifest file, whose weights lie beside it. A manifest {"sets": [FILE, ...]} stands
for the networks of several other ones beside it, which share a segmenter.
"""

import hashlib
import json
import os
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import nn

from .networks.registry import create_classifier, create_segmenter
from .tasks import Task, get_task

MANIFEST = "manifest.json"
SEGMENT = "segment"  # the task of a segmenter; all other entries name one of `tasks`


class WeightsError(RuntimeError):
    """Weights that are missing or damaged; its text is one sentence that says which and what to do."""


def manifest_path(weights: str | Path) -> Path:
    """The manifest file that `weights`, a folder or a manifest file itself, stands for."""
    path = Path(weights)
    return path if path.suffix == ".json" else path / MANIFEST


def sets_of(weights: str | Path) -> list[Path]:
    """The manifest files with the networks that `weights` stands for: its own, or those that it joins.

    Raises:
        WeightsError: there is no manifest, or it cannot be read.
    """
    path = manifest_path(weights)
    content = _content(path)
    if "sets" not in content:
        return [path]
    names = content["sets"]
    if not isinstance(names, list) or not names or any(PureWindowsPath(str(name)).name != name for name in names):
        raise WeightsError(f"{path} is damaged; restore it from the repository.")
    return [path.with_name(name) for name in names]


def read_manifest(weights: str | Path) -> dict[str, dict]:
    """The manifest's entries by model name; of several sets, the first one's, then the next one's.

    Raises:
        WeightsError: there is no manifest, it cannot be read, or two sets have another network of one name.
    """
    entries: dict[str, dict] = {}
    for path in sets_of(weights):
        try:
            found = _content(path)["models"]
            if not all(isinstance(entry, dict) for entry in found.values()):
                raise TypeError
            both = found.keys() & entries.keys()
            differing = sorted(name for name in both if fingerprint(found[name]) != fingerprint(entries[name]))
        except (KeyError, TypeError, AttributeError):
            raise WeightsError(f"{path} is damaged; restore it from the repository.") from None
        if differing:
            raise WeightsError(f"The sets that {weights} joins differ in {differing[0]!r}: use one of them alone.")
        entries |= {name: entry for name, entry in found.items() if name not in both}
    return entries


def _content(path: Path) -> dict:
    """What a manifest file holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError
        return content
    except FileNotFoundError:
        raise WeightsError(
            f"There are no weights in {path.parent}: {path.name} is missing; "
            "clone the repository whole, or train them as the README says."
        ) from None
    except (OSError, ValueError, TypeError, RecursionError):
        raise WeightsError(f"{path} is damaged; restore it from the repository.") from None


def write_manifest(weights: str | Path, entries: dict[str, dict]) -> None:
    """Replace the manifest whole: whoever reads it meanwhile, or after a crash, finds the old one or the new one.

    Raises:
        WeightsError: it joins other sets, which is where entries belong.
    """
    path = manifest_path(weights)
    if path.exists() and "sets" in _content(path):
        names = ", ".join(one.name for one in sets_of(path))
        raise WeightsError(f"{path} joins other sets of weights; name the one that is to be changed: {names}.")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"models": entries}, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(entry: dict) -> str:
    """What a manifest entry loads: the SHA-256 of its file, and after a "+" that of its refitted last layer, if any."""
    return "+".join(part["sha256"] for part in (entry, entry.get("last_layer")) if part)


def identity(entry: dict) -> dict:
    """What of a manifest entry changes an answer: all but what is merely told of the network, or shown beside it."""
    return {key: value for key, value in entry.items() if key not in ("file", "training", "figures", "heatmaps")}


def task_of(name: str, entry: dict) -> Task:
    """What the classifier `name` of the manifest is asked.

    Raises:
        WeightsError: its entry names no task that is registered.
    """
    try:
        return get_task(entry.get("task", ""))
    except ValueError as error:
        raise WeightsError(f"The manifest's entry of {name!r} cannot be used: {error}") from None


def temperature_of(name: str, entry: dict) -> float:
    """By what the classifier `name` of the manifest has its logits divided, so that probabilities mean what they say.

    Raises:
        WeightsError: it was never fitted.
    """
    if "temperature" not in entry:
        raise WeightsError(f"{name!r} has no temperature in the manifest; run python -m train.evaluate, which fits it.")
    return entry["temperature"]


def operating_point_of(entry: dict) -> float:
    """The probability from which on what a classifier of the manifest answers may be claimed.

    It is chosen on the validation split (`train.evaluate`); 0, from which on everything may be, for findings and where
    none was chosen.
    """
    return entry.get("operating_point", 0.0)


def verified(weights: str | Path, entry: dict) -> Path:
    """The path of the file that a manifest entry names, once its hash has been found right.

    Raises:
        WeightsError: the file is missing, not the one that the manifest describes, or not beside the manifest.
    """
    name = str(entry.get("file"))
    if PureWindowsPath(name).name != name:  # which knows both kinds of slash
        raise WeightsError(f"The manifest names the file {name!r}, but weights must lie beside the manifest itself.")
    path = manifest_path(weights).parent / name
    if not path.is_file():
        raise WeightsError(f"{path} is missing; restore it from the repository, or train it as the README says.")
    if sha256(path) != entry.get("sha256"):
        raise WeightsError(
            f"{path} is damaged or not the file that the manifest names; restore it from the repository."
        )
    return path


def load_beside(weights: str | Path, entry: dict, what: str) -> tuple[dict, dict[str, np.ndarray]] | None:
    """What a manifest `entry` says of its part `what`, and the arrays of the file that this names; None: it names none.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    if what not in entry:
        return None
    return entry[what], load_arrays(verified(weights, entry[what]))


def load_network(
    weights: str | Path, name: str, device: str | torch.device = "cpu", refitted: bool = True
) -> nn.Module:
    """The network `name` of the manifest, float32, in evaluation mode.

    Args:
        weights: folder with manifest.json, or a manifest file.
        name: of a model in the manifest.
        device: where to put the network.
        refitted: with the last layer that `train.refit` made, where there is one; False: as it was trained.

    Raises:
        WeightsError: it is not in the manifest, its file is missing or not the one that
            the manifest describes, or its answers are not those of its task.
    """
    entries = read_manifest(weights)
    if name not in entries:
        raise WeightsError(f"There are no weights for {name!r} in {weights}; there are: {', '.join(entries)}.")
    entry = entries[name]
    try:
        options = dict(entry["network"])
        kind = options.pop("name")
        if entry.get("task") == SEGMENT:
            net = create_segmenter(kind, **options)
        else:
            task = task_of(name, entry)
            if tuple(entry.get("classes", task.classes)) != task.classes:
                raise WeightsError(
                    f"{name!r} answers {', '.join(entry['classes'])}, but its task {task.name!r} asks for "
                    f"{', '.join(task.classes)}; the manifest names the wrong task."
                )
            net = create_classifier(kind, num_classes=len(task.classes), **options)
    except (KeyError, TypeError, ValueError):
        raise WeightsError(
            f"The manifest's entry of {name!r} describes no network; restore the manifest from the repository."
        ) from None
    path = verified(weights, entry)
    state = _tensors(path)
    if refitted and "last_layer" in entry:
        state |= _tensors(verified(weights, entry["last_layer"]))
    try:
        net.load_state_dict(
            {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        )
    except RuntimeError:
        raise WeightsError(
            f"{path} does not fit the network {kind!r} of the task {entry['task']!r}; "
            "the manifest names the wrong ones, or weights and program are of different versions."
        ) from None
    return net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise WeightsError(f"{path} is no safetensors file; restore it from the repository.") from None
