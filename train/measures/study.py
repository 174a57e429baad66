"""What a measure starts from: which networks, which X-rays, and what the networks say of them."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from scipy.special import expit, softmax
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from manet_core import create_classifier, list_models
from manet_core.explain import DEFAULT
from manet_core.preprocess import View
from manet_core.tasks import Task, get_task
from manet_core.weights import MANIFEST, fingerprint, load_network, manifest_path, read_manifest, sha256

from ..data import LungPictures, Pictures, lungs_for
from ..recipe import Recipe
from .calibration import fit_temperature, operating_point
from .statistics import row_weights

SPLITS = ("val", "test", "external")


class NotMeasured(Exception):
    """Something that a measure needs is not there; its text says what."""


@dataclass(frozen=True)
class Readings:
    """What one network says of the X-rays of `SPLITS`.

    Attributes:
        task: what it was asked.
        index: their rows, numbered from 0.
        logits: (N, K) float32.
        features: (N, C) float32, what the last layer sees.
    """

    task: Task
    index: pd.DataFrame
    logits: np.ndarray
    features: np.ndarray

    @cached_property
    def target(self) -> np.ndarray:
        """What the index says of each class, (N, K) float32; see `Task.target`."""
        return targets(self.task, self.index)

    @cached_property
    def labelled(self) -> np.ndarray:
        """Which X-rays (N,) have a label that names exactly one class."""
        return self.target.sum(1) == 1

    @cached_property
    def truth(self) -> np.ndarray:
        """Class numbers (N,); they mean something where `labelled`."""
        return self.target.argmax(1)

    @cached_property
    def patients(self) -> np.ndarray:
        """(N,) names."""
        return self.index.patient.to_numpy()

    @cached_property
    def temperature(self) -> float:
        """Fitted on the validation split; where one answer holds, every source of a label weighs the same.

        Most X-rays of a label are of one or two hospitals, and on theirs a network is right more often than elsewhere.
        """
        known = self.known("val")
        if not known.any():
            raise SystemExit("No validation X-ray has a label of this task: a temperature cannot be fitted.")
        logits, target, index = self.logits[known], self.target[known], self.index[known]
        if not self.task.exclusive:
            return fit_temperature(logits, target, exclusive=False)
        weights = row_weights(index[self.task.column].to_numpy(), index.source.to_numpy())
        return fit_temperature(logits, target, weights=weights)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(N, K), at the temperature."""
        scaled = self.logits / self.temperature
        return softmax(scaled, 1) if self.task.exclusive else expit(scaled)

    @cached_property
    def operating_point(self) -> float:
        """Chosen on the validation split; 0 for findings."""
        rows = self.known("val")
        if not self.task.exclusive or not rows.any():
            return 0.0
        return operating_point(self.probabilities[rows].max(1), self.right[rows])

    @cached_property
    def sure(self) -> np.ndarray:
        """Whether the probability of the predicted class reaches the operating point, (N,) bool."""
        return self.probabilities.max(1) >= self.operating_point

    @cached_property
    def predicted(self) -> np.ndarray:
        """Class numbers (N,)."""
        return self.logits.argmax(1)

    @cached_property
    def right(self) -> np.ndarray:
        """Whether the predicted class is one of those that the label allows, (N,) bool."""
        return self.target[np.arange(len(self.target)), self.predicted] == 1

    def split(self, name: str) -> np.ndarray:
        """Which X-rays (N,) are in a split."""
        return (self.index.split == name).to_numpy()

    def known(self, split: str) -> np.ndarray:
        """Which X-rays (N,) of a split have a label that says anything to this task."""
        says = self.target.any(1) if self.task.exclusive else ~np.isnan(self.target).any(1)
        return self.split(split) & says


def targets(task: Task, index: pd.DataFrame) -> np.ndarray:
    """`Task.target` of every row of an index, (N, K) float32."""
    cells = index[task.column] if task.column in index else pd.Series("", index.index)
    of_cell = {cell: task.target(cell) for cell in cells.unique()}
    return np.stack([of_cell[cell] for cell in cells]) if len(cells) else np.zeros((0, len(task.classes)), np.float32)


@dataclass(frozen=True)
class Study:
    """Shipped networks and the X-rays on which they are measured.

    Attributes:
        data: folder with index.csv or shards, or an address of fsspec.
        weights: folder with manifest.json, or a manifest file.
        cache: folder for decoded pictures, masks, and what networks said.
        heatmaps, disturbed: how many X-rays these measures take.
        explainers: names of those whose heatmaps are laid on lesions.
        controls, recipes: folders with trainings.
        explained: on how many X-rays with lesions explainers are compared.
        compared: names of those explainers; (): all.
        beside: other manifests, whose networks explainers are compared of, too.
    """

    data: str | Path
    weights: Path
    cache: Path
    heatmaps: int = 50
    disturbed: int = 200
    explainers: tuple[str, ...] = (DEFAULT,)
    controls: Path = Path("runs/controls")
    recipes: Path = Path("runs/recipes")
    explained: int = 12
    compared: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()

    @property
    def device(self) -> str:
        """Where networks run."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def manifest(self) -> dict[str, dict]:
        """All entries, the segmenter's too."""
        return read_manifest(self.weights)

    @cached_property
    def entries(self) -> dict[str, dict]:
        """Those of the classifiers."""
        return {name: self.manifest[name] for name in list_models() if name in self.manifest}

    @cached_property
    def tasks(self) -> dict[str, list[str]]:
        """{task: names of its networks}, for tasks of which one answer holds."""
        out: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            if get_task(entry["task"]).exclusive:
                out.setdefault(entry["task"], []).append(name)
        return out

    @property
    def segmenter_size(self) -> int:
        """Side of the segmenter's input."""
        return self.manifest["resunet"]["preprocessing"]["size"]

    def pictures(self, size: int | None = None) -> Pictures:
        """All X-rays at one size; None: the segmenter's."""
        return Pictures(self.data, size or self.segmenter_size, self.cache)

    def network(self, name: str) -> nn.Module:
        """A shipped network."""
        return load_network(self.weights, name, self.device)

    def dataset(self, entry: dict, rows: np.ndarray | None = None) -> LungPictures:
        """What a network with this manifest entry is shown of the X-rays at `rows`; None: of those of `SPLITS`."""
        view = View.of(entry["preprocessing"])
        pictures = self.pictures(view.working)
        rows = pictures.rows(*SPLITS) if rows is None else rows
        lungs = lungs_for(entry["network"]["name"], view.sees, pictures, self.weights, rows)
        task = get_task(entry["task"])
        return LungPictures("classify", pictures, rows, lungs, sees=view.sees, asked=task, view=view)

    def read(self, name: str) -> Readings:
        """What a shipped network says."""
        entry = self.entries[name]
        return self._read(name, entry, fingerprint(entry), partial(self.network, name))

    def runs(self, folder: Path) -> Iterator[tuple[str, Recipe, Readings]]:
        """(name, recipe, readings) of every finished training of a classifier in `folder`; others are passed over."""
        for path in sorted(folder.glob("*/result.json")):
            best = path.with_name("best.safetensors")
            try:
                recipe = Recipe.of(json.loads(path.read_text(encoding="utf-8"))["settings"])
            except (ValueError, KeyError, TypeError):
                recipe = None
            if recipe is None or recipe.verb != "classify" or not best.is_file():
                print(f"{path.parent} is no finished training of a classifier: passed over", flush=True)
                continue
            entry = {"task": recipe.task, "network": {"name": recipe.model}, "preprocessing": asdict(recipe)}
            load = partial(_trained, recipe, best, self.device)
            yield path.parent.name, recipe, self._read(path.parent.name, entry, sha256(best), load)

    def _read(self, name: str, entry: dict, weights: str, load: Callable[[], nn.Module]) -> Readings:
        dataset = self.dataset(entry)
        index = dataset.pictures.index.iloc[dataset.rows].reset_index(drop=True)
        films = [dataset.pictures.stem, dataset.rows.tolist()]
        shown = asdict(dataset.view)
        sees = shown.pop("sees")
        read = [weights, self.manifest["resunet"]["sha256"], shown, sees, films]
        key = hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(self.cache) / f"readings-{key}.npz"
        if path.exists():
            kept = np.load(path)
            logits, features = kept["logits"], kept["features"]
        else:
            logits, features = read_out(load(), dataset, name)
            part = path.with_suffix(f".{os.getpid()}.part")
            with part.open("wb") as file:
                np.savez(file, logits=logits, features=features)
            part.replace(path)
        return Readings(get_task(entry["task"]), index, logits, features)


def _trained(recipe: Recipe, best: Path, device: str) -> nn.Module:
    """The network of a finished training."""
    net = create_classifier(recipe.model, num_classes=len(get_task(recipe.task).classes))
    net.load_state_dict(load_file(best))
    return net.eval().to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def read_out(net: nn.Module, dataset: LungPictures, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K) and what the last layer sees (N, C), both float32, of a data set in its order."""
    device = next(net.parameters()).device
    logits, seen = [], []
    hook = last_layer(net)[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu().numpy()))
    for image, mask, *_ in tqdm(DataLoader(dataset, 16), name, unit="batch of 16"):
        logits.append(net(image.to(device, memory_format=torch.channels_last), mask.to(device)).float().cpu().numpy())
    hook.remove()
    return np.concatenate(logits), np.concatenate(seen)


def last_layer(net: nn.Module) -> tuple[str, nn.Linear]:
    """The layer that gives the logits, and its name."""
    return [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1]


def options(description: str) -> argparse.ArgumentParser:
    """The options of every verb that measures shipped weights."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", default=os.environ.get("MANET_DATA", "data"), help="folder with index.csv or shards; also MANET_DATA"
    )
    p.add_argument("--weights", default="weights", type=Path, help="folder, or a manifest file in it")
    p.add_argument("--cache", default="runs/cache", type=Path)
    return p


def results_folder(weights: Path, given: Path | None) -> Path:
    """Where figures go: `given`, or results for weights/manifest.json and results/NAME for weights/NAME.json."""
    manifest = manifest_path(weights)
    return given or (Path("results") if manifest.name == MANIFEST else Path("results") / manifest.stem)


def documents(weights: Path) -> list[Path]:
    """Model card and README, which tell of the default manifest and of no other."""
    manifest = manifest_path(weights)
    if manifest.name != MANIFEST:
        return []
    found = (manifest.with_name("MODEL_CARD.md"), manifest.parent.parent / "README.md")
    return [path for path in found if path.exists()]
