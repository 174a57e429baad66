"""X-rays on disk to arrays in memory: the index, the decoded cache, the masks, the data sets.

Every verb takes `--data ROOT`, a folder with an `index.csv` (columns image,
mask, label, source, patient, split, and for findings `findings`; paths relative
to it or absolute; see `train.prepare`), or a folder of Parquet shards that hold
the same (`train.shards`). Pictures are decoded once, by the same
`load_xray` and `resize` that the pipeline uses, into a memory-mapped array.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from manet_core import CLASSES, load_xray
from manet_core.lungs import predict_lungs
from manet_core.networks.registry import spec
from manet_core.preprocess import View, network_input, resize, to_unit_range
from manet_core.tasks import MANET, Task
from manet_core.weights import load_network, read_manifest

from .recipe import Recipe, Run
from .shards import list_shards, open_file, read_shard_index, shard_of, shard_state

COLUMNS = ["image", "mask", "label", "source", "patient", "split"]


def read_index(data: str | Path) -> pd.DataFrame:
    """`data`/index.csv, all columns as text, image and mask paths made absolute; or the index of the shards in `data`.

    Raises:
        SystemExit: there is no index, or it lacks a column, or a shard is missing; the text says what to run.
    """
    root = Path(data)
    path = root / "index.csv"
    shards = [] if path.is_file() else list_shards(data)
    if shards:
        path, index = data, read_shard_index(shards)
    elif path.is_file():
        index = pd.read_csv(path, dtype=str, keep_default_na=False)
    elif "://" in str(data):
        raise SystemExit(f"There are no shards at {data}: write some with `python -m train.prepare shards`.")
    else:
        raise SystemExit(
            f"There is no {path}: run `python -m train.prepare --data {root} --out DIR` and use --data DIR."
        )
    missing = [column for column in COLUMNS if column not in index]
    if missing:
        raise SystemExit(f"{path} lacks the column(s) {', '.join(missing)}.")
    if shards:
        return index
    for column in ("image", "mask"):
        index[column] = [str(root / name) if name else "" for name in index[column]]
    return index


def split_by_image(index: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The index with the five classes' train, val and test drawn anew, 8:1:1 over images of each class.

    This is all that the paper says of its own split. Images of one patient may then lie on both sides, so that a
    network is rewarded for recognising people: use it to compare with the paper, never to judge a network.
    """
    drawn = index.split.isin(["train", "val", "test"]) & index.label.isin(CLASSES)
    split = index.split.copy()
    generator = np.random.default_rng(seed)
    for _, rows in index[drawn].groupby("label"):
        order = generator.permutation(rows.index)
        tenth = round(len(order) / 10)
        split[order[:tenth]], split[order[tenth : 2 * tenth]], split[order[2 * tenth :]] = "test", "val", "train"
    return index.assign(split=split)


def fingerprint(index: pd.DataFrame) -> str:
    """12 hexadecimal digits that depend on the names, sizes and times of all files of an index, or of its shards."""
    found, shards = hashlib.sha256(), lru_cache(shard_state)
    for name in (*index.image, *index["mask"]):
        if shard := shard_of(name):
            told = shards(shard)
        else:
            there = os.stat(name) if name and os.path.exists(name) else None
            told = there and (there.st_size, there.st_mtime_ns)
        found.update(f"{name}|{told}\n".encode())
    return found.hexdigest()[:12]


@lru_cache
def state(run: Run) -> str:
    """What else than a network's weights decides its answers: X-rays, labels, splits, the segmenter; 12 hex digits."""
    index, segmenter = read_index(run.data), read_manifest(run.weights)["resunet"]["sha256"]
    return hashlib.sha256(f"{fingerprint(index)}{index.to_csv()}{segmenter}".encode()).hexdigest()[:12]


class Pictures:
    """All pictures of an index at one square size, decoded once.

    Attributes:
        index: the rows, in the order of the arrays.
        images: (N, S, S) uint8, memory-mapped.
        masks: (N, S, S) bool, memory-mapped; False where a row has no mask.
    """

    def __init__(self, data: str | Path, size: int, cache: str | Path = "runs/cache"):
        address = "://" in str(data)
        self.data = str(data) if address else Path(data).resolve()  # one cache, however the folder is spelled
        self.index, self.size = read_index(self.data), size
        self.folder = Path(cache)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stem = f"{self._fingerprint()}-{size}"
        paths = [self.folder / f"{self.stem}-{kind}.npy" for kind in ("images", "masks")]
        with FileLock(f"{paths[0]}.lock"):  # of several trainings that start together, one decodes
            if not all(path.exists() for path in paths):
                self._decode(*paths)
        self.images, self.masks = (np.load(path, mmap_mode="r") for path in paths)

    def _fingerprint(self) -> str:
        """A picture that has changed is decoded again."""
        return fingerprint(self.index)

    def _decode(self, images: Path, masks: Path) -> None:
        shape = (len(self.index), self.size, self.size)
        parts = [path.with_suffix(".part") for path in (images, masks)]
        pixels = np.lib.format.open_memmap(parts[0], "w+", np.uint8, shape)
        lungs = np.lib.format.open_memmap(parts[1], "w+", bool, shape)
        rows = zip(self.index.image, self.index["mask"])
        for i, (image, mask) in enumerate(tqdm(rows, "decoding", len(self.index), unit="picture")):
            pixels[i] = np.rint(resize(load_xray(open_file(image)).pixels, self.size) * 255)
            if mask:
                lungs[i] = resize(np.asarray(Image.open(open_file(mask)).convert("1"), np.float32), self.size) > 0.5
        pixels.flush(), lungs.flush()
        del pixels, lungs  # Windows renames no file that is mapped
        for part, path in zip(parts, (images, masks)):
            part.rename(path)  # only a finished cache gets its name, whatever interrupts this

    def __getstate__(self) -> dict:
        """For loader processes: the arrays are opened again by their paths, not copied."""
        return vars(self) | {"images": self.images.filename, "masks": self.masks.filename}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.images, self.masks = (np.load(state[name], mmap_mode="r") for name in ("images", "masks"))

    def resized(self, size: int) -> "Pictures":
        """The same pictures at another size."""
        return Pictures(self.data, size, self.folder)

    def rows(self, *splits: str, with_mask: bool = False, labelled: bool = False, task: Task | None = None):
        """Positions (n,) of the rows in `splits`.

        Args:
            with_mask: only those with a mask.
            labelled: only those with one of the five classes.
            task: only those whose label this task can learn from, partial labels included.
        """
        keep = self.index.split.isin(splits)
        if with_mask:
            keep &= self.index["mask"] != ""
        if labelled:
            keep &= self.index.label.isin(CLASSES)
        if task is not None:
            keep &= _column(self.index, task).map(task.knows)
        return np.flatnonzero(keep)

    def labels(self, rows: np.ndarray, task: Task = MANET) -> np.ndarray:
        """Class numbers (len(rows),) int64, in the order of the task's classes; −1 for a label of none or several."""
        number = {name: k for k, name in enumerate(task.classes)}
        number |= {label: number[allowed[0]] for label, allowed in task.labels.items() if len(allowed) == 1}
        return np.array([number.get(label, -1) for label in self.index.label.iloc[rows]], np.int64)

    def targets(self, rows: np.ndarray, task: Task = MANET) -> np.ndarray:
        """What the label of each row says of each class, (len(rows), K) float32; see `Task.target`."""
        return np.stack([task.target(label) for label in _column(self.index, task).iloc[rows]])


def _column(index: pd.DataFrame, task: Task) -> pd.Series:
    """The column that holds a task's labels; empty cells where the index has no such column."""
    return index[task.column] if task.column in index else pd.Series("", index.index)


def draw_weights(
    labels: pd.Series, sources: pd.Series, balance: float, balance_classes: bool = False
) -> torch.Tensor | None:
    """How often to draw each row (N,); None where each is drawn once.

    With `balance` 1 each source of a class is drawn equally often; with 0, each of its rows. `balance_classes` then
    gives all labels the same weight.
    """
    if not (balance or balance_classes):
        return None
    groups = labels + " of " + sources
    weights = groups.map(groups.value_counts().astype(float) ** -balance)
    if balance_classes:
        weights /= weights.groupby(labels).transform("sum")
    return torch.tensor(weights.tolist())


class LungPictures(Dataset):
    """Items for one epoch after another; set the attribute `epoch` before each.

    What is drawn for an item depends on (seed, epoch, item) alone, not on the
    number of workers or on what was drawn before, so an interrupted training
    goes on as if it had not been interrupted. Item i + k · len is the picture
    of item i with another draw, for the k-th time more that an epoch shows it.

    Args:
        task: "segment" gives (image in [0, 1], mask), float32 (1, S, S);
            "classify" gives (what the network sees in [−1, 1], mask, target), the target being (K,) float32.
        lungs: (N, S, S) bool, the masks to use, by row of `pictures`.
        augment: an `augment.augmentation`; None for validation and testing.
        sees: one of `manet_core.preprocess.SEES`; all but "lungs" are controls.
        asked: the task whose labels are the targets.
        view: how the input is cut out of the pictures; None: the pictures as they are.
    """

    def __init__(
        self,
        task: str,
        pictures: Pictures,
        rows: np.ndarray,
        lungs: np.ndarray,
        augment=None,
        seed: int = 0,
        sees: str = "lungs",
        asked: Task = MANET,
        view: View | None = None,
    ):
        self.task, self.pictures, self.rows, self.lungs = task, pictures, rows, lungs
        self.augment, self.seed, self.epoch, self.sees = augment, seed, 0, sees
        self.view = view or View(pictures.size, pictures.size)
        if task == "classify":
            self.labels, self.targets = pictures.labels(rows, asked), pictures.targets(rows, asked)
        self.by_source = []  # rows of each source to lend their style from, if the augmentation asks for it
        if augment is not None and any("style" in step.targets_as_params for step in augment.transforms):
            sources = pictures.index.source.to_numpy()[rows]
            self.by_source = [rows[sources == source] for source in np.unique(sources)]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple]:
        return (self[item] for item in range(len(self)))  # as there is no last number, nothing else would end it

    def __getstate__(self) -> dict:
        """For loader processes: a memory-mapped mask is opened again by its path, not copied."""
        mapped = isinstance(self.lungs, np.memmap)
        return vars(self) | ({"lungs": str(self.lungs.filename)} if mapped else {})

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if isinstance(self.lungs, str):
            self.lungs = np.load(self.lungs, mmap_mode="r")

    def __getitem__(self, item: int) -> tuple:
        place = item % len(self)
        row = self.rows[place]
        image, mask = np.array(self.pictures.images[row]), np.array(self.lungs[row], np.uint8)
        if self.augment is not None:
            for step, transform in enumerate(self.augment.transforms):
                # One seed for the whole Compose would make all steps draw the same numbers, so that they come together.
                transform.set_random_seed(hash((self.seed, self.epoch, item, step)) % 2**32)
            given = {"image": image, "mask": mask}
            if self.by_source:
                rng = np.random.default_rng((self.seed, self.epoch, item, 1))
                lender = rng.choice(self.by_source[rng.integers(len(self.by_source))])
                given["style"] = [np.array(self.pictures.images[lender])]
            out = self.augment(**given)
            image, mask = out["image"], out["mask"]
        image = image.astype(np.float32) / 255
        if self.task == "segment":
            return torch.from_numpy(to_unit_range(image))[None], torch.from_numpy(mask.astype(np.float32))[None]
        rng = np.random.default_rng((self.seed, self.epoch, item))
        box = self.view.box(mask > 0)
        image, mask = self.view.cut(image, box), self.view.cut(mask.astype(np.float32), box) > 0.5
        seen = network_input(image, mask, self.sees, rng)
        return torch.from_numpy(seen)[None], torch.from_numpy(mask.astype(np.float32))[None], self.targets[place]


class RawPictures(Dataset):
    """Pictures for an augmentation that works on whole batches (`train.broad`), kept where it works.

    An item is (image (1, W, W) uint8, masks (C, W, W) bool, box (4,), target); a batch is taken in one step, so that
    a GPU that holds the pictures waits for no loader.

    Args:
        images: (N, W, W) uint8.
        masks: (N, C, W, W) bool.
        boxes: (N, 4) float32.
        targets: (N, K) float32.
        device: where to keep them.
    """

    def __init__(self, images: np.ndarray, masks: np.ndarray, boxes: np.ndarray, targets: np.ndarray, device="cpu"):
        self.epoch = 0
        arrays = (images[:, None], masks, boxes, targets)
        self.tensors = [torch.tensor(array, device=device) for array in arrays]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, items: list[int]) -> list[torch.Tensor]:
        chosen = torch.tensor(items, device=self.tensors[0].device)
        return [tensor[chosen] for tensor in self.tensors]


def lung_pictures(recipe: Recipe, run: Run, *splits: str, task: Task, augment=None) -> LungPictures:
    """The classification data set of `splits`, as `recipe` has it shown."""
    view = View.of(vars(recipe))
    pictures = Pictures(run.data, view.working, run.cache)
    if recipe.split == "image":
        pictures.index = split_by_image(pictures.index)
    rows = pictures.rows(*splits, task=task)
    rows = rows[of_sources(pictures.index.iloc[rows], recipe.sources)]
    lungs = lungs_for(recipe.model, recipe.sees, pictures, run.weights, rows)
    return LungPictures("classify", pictures, rows, lungs, augment, recipe.seed, recipe.sees, task, view)


def of_sources(index: pd.DataFrame, sources: str | None) -> np.ndarray:
    """(N,) bool, which rows come from one of `sources`, joined by commas; None: all.

    Raises:
        SystemExit: a source of which there is no row.
    """
    if sources is None:
        return np.ones(len(index), bool)
    wanted = sources.split(",")
    if unknown := set(wanted) - set(index.source):
        raise SystemExit(
            f"There is no X-ray from {', '.join(sorted(unknown))}; there are: {', '.join(sorted(set(index.source)))}."
        )
    return index.source.isin(wanted).to_numpy()


def lungs_for(model: str, sees: str, pictures: Pictures, weights: str | Path, rows: np.ndarray) -> np.ndarray:
    """`predicted_lungs` for a network that is shown `sees`; all False, at no cost, for one that needs no mask."""
    if sees == "whole" and not spec(model).uses_mask:
        return np.broadcast_to(False, pictures.images.shape)
    return predicted_lungs(pictures, weights, rows)


def predicted_lungs(pictures: Pictures, weights: str | Path, rows: np.ndarray) -> np.ndarray:
    """Cleaned masks (N, S, S) bool of which those at `rows` are as the pipeline predicts them.

    Each X-ray is segmented when it is first asked for, at the segmenter's own size; what was segmented is kept,
    whatever interrupts.
    """
    entry = read_manifest(weights)["resunet"]
    size = entry["preprocessing"]["size"]
    path = pictures.folder / f"{pictures.stem}-lungs-{entry['sha256'][:12]}.npy"
    with FileLock(f"{path}.lock"):
        lungs = _kept(path, pictures.images.shape)
        known = _kept(path.with_suffix(".known.npy"), lungs.shape[:1])  # which rows are there
        missing = rows[~known[rows]]
        if len(missing):
            images = (pictures if pictures.size == size else pictures.resized(size)).images
            segmenter = load_network(weights, "resunet", "cuda" if torch.cuda.is_available() else "cpu")
            for start in tqdm(range(0, len(missing), 32), "segmenting", unit="batch of 32"):
                some = missing[start : start + 32]
                found = predict_lungs(segmenter, images[some].astype(np.float32) / 255, size)
                lungs[some] = [mask.at(pictures.size) for mask in found]
                known[some] = True
    return np.load(path, mmap_mode="r")


def _kept(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bool array of `shape` that a file keeps, to read and write; all False where the file is new."""
    if not path.exists():
        part = path.with_suffix(".part")
        np.lib.format.open_memmap(part, "w+", bool, shape).flush()
        part.rename(path)
    return np.load(path, mmap_mode="r+")
