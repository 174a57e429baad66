"""An archive of X-rays, read into Parquet files: each X-ray once, however often the work is interrupted.

The rows of some hundred X-rays are a part, which is written whole under another name and then renamed: a part is there
whole or not at all. What finished parts hold is not read again. So it does not matter where or how often a part is
worked on, as its name says which X-rays it is of.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .pipeline import NO_READING, SEGMENTER, Analysis, Pipeline, sentence
from .sources import FetchError, read_film
from .table import claim_text
from .weights import identity

ROWS, MASKS, HEATMAPS = "rows", "masks", "heatmaps"  # folders of parts
SCHEMAS = {
    ROWS: pa.schema(
        {
            "file": pa.string(),
            "network": pa.string(),
            "task": pa.string(),
            "predicted": pa.string(),
            "claim": pa.string(),
            "reliable": pa.bool_(),
            "probabilities": pa.map_(pa.string(), pa.float32()),
            "lung_area": pa.float32(),
            "lung_area_right": pa.float32(),
            "lung_area_left": pa.float32(),
            "distance": pa.float32(),
            "withheld": pa.list_(pa.string()),
            "warnings": pa.list_(pa.string()),
            "weights": pa.string(),
            "error": pa.string(),
        }
    ),
    MASKS: pa.schema({"file": pa.string(), "side": pa.int32(), "mask": pa.binary()}),
    HEATMAPS: pa.schema(
        {
            "file": pa.string(),
            "network": pa.string(),
            "class": pa.string(),
            "side": pa.int32(),
            "box": pa.list_(pa.float32(), 4),
            "peak": pa.float32(),
            "heatmap": pa.binary(),
        }
    ),
}


class ArchiveError(RuntimeError):
    """An output folder that cannot be gone on with; its text is one sentence that says why."""


@dataclass(frozen=True)
class Job:
    """What is asked of each X-ray, and where the answers go.

    Attributes:
        out: folder of the parts.
        weights: folder with manifest.json, or a manifest file.
        models: names of the networks to ask.
        device: as `Pipeline.load` has it.
        masks: keep the cleaned masks, at the segmenter's size.
        heatmaps: make and keep Grad-CAM heatmaps of all classes, at the networks' size.
    """

    out: str
    weights: str
    models: tuple[str, ...]
    device: str = "auto"
    masks: bool = False
    heatmaps: bool = False

    def load(self) -> Pipeline:
        """The networks."""
        return Pipeline.load(self.weights, list(self.models), self.device)


@dataclass
class Part:
    """The X-rays of a part so far, and their rows in each folder.

    Attributes:
        names: of the X-rays that need not be asked for again.
        failed: how many could not be read.
        unfetched: how many of these their store did not give; they have no name and no row here.
        tables: {folder: rows}.
    """

    names: list[str] = field(default_factory=list)
    failed: int = 0
    unfetched: int = 0
    tables: dict[str, list[dict]] = field(default_factory=lambda: {kind: [] for kind in SCHEMAS})

    def add(self, job: Job, hashes: dict[str, str], name: str, found: Analysis | Exception) -> None:
        """Add what is known of an X-ray."""
        if isinstance(found, FetchError):
            self.failed += 1
            self.unfetched += 1
            return
        name = text(name)
        self.names.append(name)
        if isinstance(found, Exception):
            self.failed += 1
            self.tables[ROWS].append({"file": name, "error": sentence(found)})
            return
        self.tables[ROWS] += _rows(name, found, hashes)
        if job.masks:
            mask = found.segmentation.cleaned
            self.tables[MASKS].append({"file": name, "side": len(mask), "mask": np.packbits(mask).tobytes()})
        if job.heatmaps:
            self.tables[HEATMAPS] += _heatmaps(name, found)

    def save(self, job: Job) -> None:
        """Write the part, unless nothing is in it; the rows, which say that it is finished, last."""
        if not self.names:
            return
        title = hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:20]
        for kind in (MASKS, HEATMAPS, ROWS):
            if kind == ROWS or getattr(job, kind):
                path = Path(job.out, kind, f"{title}.parquet")
                unfinished = path.with_name(f".{title}.{os.getpid()}.unfinished")
                table = pa.Table.from_pylist(self.tables[kind], SCHEMAS[kind])
                pq.write_table(table, unfinished, compression="zstd")
                unfinished.replace(path)


def text(name: str) -> str:
    """The name of a file as Parquet takes it: it may hold bytes that are no UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def _rows(name: str, found: Analysis, hashes: dict[str, str]) -> list[dict]:
    """One row a network, or one without a network where the mask alone was asked for."""
    known = found.to_dict()
    film = {
        "file": name,
        "reliable": known["reliable"],
        "lung_area": known["lung_area"],
        "lung_area_right": known["lung_areas"]["right"],
        "lung_area_left": known["lung_areas"]["left"],
        "distance": known["distance"],
        "withheld": known["withheld"],
        "warnings": known["warnings"],
    }
    return [
        film
        | {
            "network": model,
            "task": reading.task,
            "predicted": ", ".join(reading.present) if found.reliable else NO_READING,
            "claim": claim_text(found, reading.task),
            "probabilities": list(reading.probabilities.items()),
            "weights": hashes[model],
        }
        for model, reading in found.readings.items()
    ] or [film]


def _heatmaps(name: str, found: Analysis) -> list[dict]:
    return [
        {
            "file": name,
            "network": model,
            "class": title,
            "side": len(heatmap),
            "box": list(reading.box),
            "peak": reading.peaks[title],
            "heatmap": np.rint(heatmap * 255).astype(np.uint8).tobytes(),
        }
        for model, reading in found.readings.items()
        for title, heatmap in reading.heatmaps.items()
    ]


def mask_of(row: dict) -> np.ndarray:
    """The mask (side, side) bool of a row of `masks`."""
    bits = np.frombuffer(row["mask"], np.uint8)
    return np.unpackbits(bits, count=row["side"] ** 2).reshape(row["side"], row["side"]).astype(bool)


def heatmap_of(row: dict) -> np.ndarray:
    """The heatmap (side, side) float32 in [0, 1], in steps of 1/255, of a row of `heatmaps`."""
    return np.frombuffer(row["heatmap"], np.uint8).reshape(row["side"], row["side"]).astype(np.float32) / 255


def begin(job: Job, entries: dict[str, dict]) -> set[str]:
    """Make the output folder ready, and tell which X-rays its finished parts hold.

    Args:
        job: what will be asked.
        entries: of the manifest of its weights.

    Raises:
        ArchiveError: the folder holds the answers of other networks, or of other options.
        OSError: it cannot be written to.
    """
    asked = {name: identity(entries[name]) for name in (SEGMENTER, *job.models) if name in entries}
    settings = json.dumps({"networks": asked, MASKS: job.masks, HEATMAPS: job.heatmaps}, indent=2) + "\n"
    known = Path(job.out, "settings.json")
    for kind in SCHEMAS:
        Path(job.out, kind).mkdir(parents=True, exist_ok=True)
    if not known.exists():
        known.write_text(settings, encoding="utf-8")
    elif not _same(known, settings):
        raise ArchiveError(f"{job.out} holds answers of other networks or options; choose another --out.")
    finished = {path.name for path in Path(job.out, ROWS).glob("*.parquet")}
    for kind in SCHEMAS:
        for path in Path(job.out, kind).iterdir():
            if path.name not in finished:  # what an interrupted part left
                path.unlink()
    return {name for path in finished for name in _files_in(Path(job.out, ROWS, path))}


def _same(path: Path, settings: str) -> bool:
    """Whether a file says the same as JSON text, in whatever order; False, too, of one that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) == json.loads(settings)
    except ValueError:
        return False


def _files_in(path: Path) -> list[str]:
    try:
        return pq.read_table(path, columns=["file"])["file"].to_pylist()
    except (pa.ArrowInvalid, OSError):
        raise ArchiveError(f"{path} is damaged; remove it, and its X-rays are read again.") from None


def read_here(job: Job, names: list[str], size: int) -> Iterator[tuple[int, int, int]]:
    """Read X-rays in this process, in parts of `size`; yields (read, failed, of these unfetched) of each X-ray.

    When it is closed or interrupted, what was read until then becomes a part.
    """
    if not names:
        return
    pipe, part = job.load(), Part()
    try:
        for name, found in _analyses(pipe, job, names):
            failed, unfetched = part.failed, part.unfetched
            part.add(job, pipe.hashes, name, found)
            failed, unfetched = part.failed - failed, part.unfetched - unfetched
            if len(part.names) == size:
                part.save(job)
                part = Part()
            yield 1 - failed, failed, unfetched
    finally:
        part.save(job)


def _analyses(pipe: Pipeline, job: Job, names: list[str]) -> Iterator[tuple[str, Analysis | Exception]]:
    sources = (partial(read_film, name) for name in names)
    with closing(pipe.analyze_many(sources, heatmaps=job.heatmaps, return_exceptions=True)) as found:
        yield from zip(names, found)


class Reader:
    """Reads one part after another, in a process of a cluster; a part that is there is left alone."""

    def __init__(self, job: Job):
        self.job, self.pipe = job, job.load()

    def __call__(self, names: list[str]) -> tuple[int, int, int]:
        """Read a part; returns (read, failed, of these unfetched)."""
        part = Part()
        for name, found in _analyses(self.pipe, self.job, names):
            part.add(self.job, self.pipe.hashes, name, found)
        part.save(self.job)
        return len(names) - part.failed, part.failed, part.unfetched


def summary(read: int, failed: int, before: int, seconds: float, cores: int) -> dict:
    """What a run of the command did."""
    return {
        "read": read,
        "failed": failed,
        "finished before": before,
        "seconds": round(seconds, 1),
        "cores": cores,
        "films per core-hour": round((read + failed) * 3600 / max(seconds * cores, 1e-9)),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
