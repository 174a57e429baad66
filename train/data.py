"""X-rays on disk to arrays in memory: the index, the decoded cache, the augmentation.

Every verb takes `--data ROOT`, a folder with an `index.csv` (columns image,
mask, label, source, patient, split; paths relative to it or absolute; see
`train.prepare`). Pictures are decoded once, by the same `load_xray` and
`resize` that the pipeline uses, into a memory-mapped array.
"""

import hashlib
import os
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # albumentations asks a package index for updates at import

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from PIL import Image
from skimage.morphology import convex_hull_object
from torch.utils.data import Dataset
from tqdm import tqdm

from manet_core import CLASSES, load_xray
from manet_core.lungs import predict_lungs
from manet_core.preprocess import network_input, resize, to_unit_range
from manet_core.weights import load_network, read_manifest

COLUMNS = ["image", "mask", "label", "source", "patient", "split"]


def read_index(data: str | Path) -> pd.DataFrame:
    """`data`/index.csv, all columns as text, image and mask paths made absolute.

    Raises:
        SystemExit: there is no index, or it lacks a column; the text says what to run.
    """
    root = Path(data)
    path = root / "index.csv"
    if not path.is_file():
        raise SystemExit(
            f"There is no {path}: run `python -m train.prepare --data {root} --out DIR` and use --data DIR."
        )
    index = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [column for column in COLUMNS if column not in index]
    if missing:
        raise SystemExit(f"{path} lacks the column(s) {', '.join(missing)}.")
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


class Pictures:
    """All pictures of an index at one square size, decoded once.

    Attributes:
        index: the rows, in the order of the arrays.
        images: (N, S, S) uint8, memory-mapped.
        masks: (N, S, S) bool, memory-mapped; False where a row has no mask.
    """

    def __init__(self, data: str | Path, size: int, cache: str | Path = "runs/cache"):
        self.data = Path(data).resolve()  # one cache, however the folder is spelled
        self.index, self.size = read_index(self.data), size
        paths = "\n".join(self.index.image + "|" + self.index["mask"])
        stem = f"{hashlib.sha256(paths.encode()).hexdigest()[:12]}-{size}"
        self.folder = Path(cache)
        self.folder.mkdir(parents=True, exist_ok=True)
        images, masks = self.folder / f"{stem}-images.npy", self.folder / f"{stem}-masks.npy"
        with FileLock(f"{images}.lock"):  # of several trainings that start together, one decodes
            if not (images.exists() and masks.exists()):
                self._decode(images, masks)
        self.stem = stem
        self.images, self.masks = np.load(images, mmap_mode="r"), np.load(masks, mmap_mode="r")

    def _decode(self, images: Path, masks: Path) -> None:
        shape = (len(self.index), self.size, self.size)
        parts = [path.with_suffix(".part") for path in (images, masks)]
        pixels = np.lib.format.open_memmap(parts[0], "w+", np.uint8, shape)
        lungs = np.lib.format.open_memmap(parts[1], "w+", bool, shape)
        rows = zip(self.index.image, self.index["mask"])
        for i, (image, mask) in enumerate(tqdm(rows, "decoding", len(self.index), unit="picture")):
            pixels[i] = np.rint(resize(load_xray(image).pixels, self.size) * 255)
            if mask:
                lungs[i] = resize(np.asarray(Image.open(mask).convert("1"), np.float32), self.size) > 0.5
        pixels.flush(), lungs.flush()
        for part, path in zip(parts, (images, masks)):
            part.rename(path)  # only a finished cache gets its name, whatever interrupts this

    def resized(self, size: int) -> "Pictures":
        """The same pictures at another size."""
        return Pictures(self.data, size, self.folder)

    def rows(self, *splits: str, with_mask: bool = False, labelled: bool = False) -> np.ndarray:
        """Positions of the rows in `splits`, optionally only those with a mask or with one of the five classes."""
        keep = self.index.split.isin(splits)
        if with_mask:
            keep &= self.index["mask"] != ""
        if labelled:
            keep &= self.index.label.isin(CLASSES)
        return np.flatnonzero(keep)

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Class numbers (len(rows),) int64, in the order of `CLASSES`; −1 for any other label."""
        number = {label: k for k, label in enumerate(CLASSES)}
        return np.array([number.get(label, -1) for label in self.index.label.iloc[rows]], np.int64)


AUGMENTATIONS = ("paper", "robust", "style", "masks")


def augmentation(rotation: float, intensity: bool, kind: str = "paper") -> A.Compose:
    """Shift ±6.25 %, scale ±20 %, rotation ±`rotation`°, each with p = 0.5 (MANet, sections 3.1 and 3.2).

    With `intensity`, brightness and contrast ±20 % as well, on the image alone. The other kinds are not in the paper:
    "robust" adds what another hospital's film may have gone through: another tone curve, a lower resolution, JPEG,
    noise. "style" adds to that the tones and the coarse shading of another source's X-ray, which is given to the
    Compose as `style`, and other proportions of the chest, so that neither tells the class. "masks" is `OtherMask`.
    """
    move = dict(border_mode=cv2.BORDER_CONSTANT, interpolation=cv2.INTER_LINEAR, p=0.5)
    steps = [
        A.Affine(translate_percent=(-0.0625, 0.0625), **move),
        A.Affine(scale=(0.8, 1.2), **move),
        A.Affine(rotate=(-rotation, rotation), **move),
    ]
    if intensity:
        steps.append(A.RandomBrightnessContrast(0.2, 0.2, p=0.5))
    if kind in ("robust", "style"):
        smooth = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}
        steps += [
            A.RandomGamma((50, 200), p=0.5),
            A.RandomToneCurve(0.3, p=0.3),
            A.CLAHE((1, 4), p=0.2),
            A.Downscale((0.3, 0.9), interpolation_pair=smooth, p=0.4),
            A.ImageCompression(quality_range=(20, 95), p=0.4),
            A.GaussNoise((0.005, 0.08), p=0.4),
        ]
    if kind == "style":
        proportions = {"x": (0.75, 1.3), "y": (0.75, 1.3)}
        steps = [
            A.HistogramMatching(blend_ratio=(0.3, 1.0), metadata_key="style", p=0.5),
            A.FDA(beta_limit=(0, 0.05), metadata_key="style", p=0.3),
            A.Affine(scale=proportions, shear=(-8, 8), **move),
            *steps,
        ]
    if kind == "masks":
        steps.insert(0, OtherMask(p=0.75))
    return A.Compose(steps)


class OtherMask(A.DualTransform):
    """The mask as another annotator might have drawn it: each lung's convex hull, or a rim more or less, or both.

    Annotators of one source leave out the lung behind the heart, those of another include it, and a segmenter follows
    the one whose films a picture looks like: its mask then tells the source, and with it the class.
    """

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Whether to fill the hollows, and how wide a rim to add (to take away, below 0), in 1/64 of the side."""
        return {"hull": self.py_random.random() < 0.5, "rim": self.py_random.randint(-2, 2)}

    def apply(self, img: np.ndarray, **params) -> np.ndarray:
        """The image stays as it is."""
        return img

    def apply_to_mask(self, mask: np.ndarray, hull: bool, rim: int, **params) -> np.ndarray:
        """(S, S) uint8, 0 and 1."""
        if hull:
            mask = convex_hull_object(mask > 0).astype(np.uint8)
        if rim:
            side = 2 * abs(rim) * len(mask) // 64 + 1
            disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
            mask = (cv2.dilate if rim > 0 else cv2.erode)(mask, disc)
        return mask


def draw_weights(groups: pd.Series, balance: float) -> torch.Tensor | None:
    """How often to draw each row (N,) so that `balance` 1 draws each group equally often; None for 0, each row once."""
    return torch.tensor(groups.map(groups.value_counts().astype(float) ** -balance).tolist()) if balance else None


class LungPictures(Dataset):
    """Items for one epoch after another; set the attribute `epoch` before each.

    What is drawn for an item depends on (seed, epoch, item) alone, not on the
    number of workers or on what was drawn before, so an interrupted training
    goes on as if it had not been interrupted.

    Args:
        task: "segment" gives (image in [0, 1], mask), float32 (1, S, S);
            "classify" gives (what the network sees in [−1, 1], mask, class number).
        lungs: (N, S, S) bool, the masks to use, by row of `pictures`.
        augment: None for validation and testing.
        sees: one of `manet_core.preprocess.SEES`; all but "lungs" are controls.
    """

    def __init__(
        self,
        task: str,
        pictures: Pictures,
        rows: np.ndarray,
        lungs: np.ndarray,
        augment: A.Compose | None = None,
        seed: int = 0,
        sees: str = "lungs",
    ):
        self.task, self.pictures, self.rows, self.lungs = task, pictures, rows, lungs
        self.augment, self.seed, self.epoch, self.sees = augment, seed, 0, sees
        self.labels = pictures.labels(rows) if task == "classify" else None
        self.by_source = []  # rows of each source to lend their style from, if the augmentation asks for it
        if augment is not None and any("style" in step.targets_as_params for step in augment.transforms):
            sources = pictures.index.source.to_numpy()[rows]
            self.by_source = [rows[sources == source] for source in np.unique(sources)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple:
        row = self.rows[item]
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
        seen = network_input(image, mask, self.sees, rng)
        return torch.from_numpy(seen)[None], torch.from_numpy(mask.astype(np.float32))[None], self.labels[item]


def predicted_lungs(pictures: Pictures, weights: str | Path, rows: np.ndarray) -> np.ndarray:
    """Cleaned masks (N, S, S) bool of which those at `rows` are as the pipeline would predict them.

    Each X-ray is segmented once, at the segmenter's own size, when it is first asked for. What was segmented is kept,
    whatever interrupts, and the masks of every other size are made of it.
    """
    entry = read_manifest(weights)["resunet"]
    size = entry["preprocessing"]["size"]
    path = pictures.folder / f"{pictures.stem}-lungs-{entry['sha256'][:12]}.npy"
    with FileLock(f"{path}.lock"):
        lungs = _kept(path, pictures.images.shape)
        known = _kept(path.with_suffix(".known.npy"), lungs.shape[:1])  # which rows are there
        missing = rows[~known[rows]]
        if len(missing) and pictures.size != size:
            found = predicted_lungs(pictures.resized(size), weights, missing)
            for row in missing:
                lungs[row] = resize(found[row].astype(np.float32), pictures.size) > 0.5
            known[missing] = True
        elif len(missing):
            segmenter = load_network(weights, "resunet", "cuda" if torch.cuda.is_available() else "cpu")
            for i in tqdm(range(0, len(missing), 8), "segmenting", unit="batch of 8"):
                some = missing[i : i + 8]
                found = predict_lungs(segmenter, pictures.images[some].astype(np.float32) / 255, size)
                lungs[some] = [mask.cleaned for mask in found]
                known[some] = True
    return np.load(path, mmap_mode="r")


def _kept(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bool array of `shape` that a file keeps, to read and write; all False where the file is new."""
    if not path.exists():
        part = path.with_suffix(".part")
        np.lib.format.open_memmap(part, "w+", bool, shape)
        part.rename(path)
    return np.load(path, mmap_mode="r+")
