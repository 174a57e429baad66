"""A data set as Parquet shards: the index and the files themselves, for data that no one disk holds.

    python -m train.prepare shards --data DATA --out DIR

A shard is called NUMBER-of-COUNT-SET.parquet, so that a missing one is noticed. It has the columns of the index, and
`image_file` and `mask_file`: the bytes of the files as they were, null where a row has no mask. Every `--data` takes a
folder of shards, or its address in a store that fsspec knows; shards of several sets may lie in one folder. A row
group holds few films, so that one film is read without the rest of its shard.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from manet_core.sources import SourceError, file_system

SHARD_BYTES, GROUP_BYTES = 512 << 20, 16 << 20  # of the files in a shard, and in a row group
_NAME = re.compile(r"(\d+)-of-(\d+)-([0-9a-f]{12})\.parquet")
_FILES = {"image": "image_file", "mask": "mask_file"}
_IN_SHARD = tuple(f"::{column}" for column in _FILES)


def write_shards(
    index: pd.DataFrame, title: str, out: Path, shard_bytes: int = SHARD_BYTES, group_bytes: int = GROUP_BYTES
) -> list[Path]:
    """Write an index and its files as shards; those that an interrupted call has finished are left as they are.

    Args:
        index: as `data.read_index` gives it, of files on disk.
        title: 12 hexadecimal digits that tell this state of the data from every other.
        out: folder of the shards.
        shard_bytes, group_bytes: how much a shard and a row group hold; a single film may be more.

    Raises:
        SystemExit: the folder holds other shards, or another index.
    """
    if (out / "index.csv").exists():
        raise SystemExit(f"{out} has an index.csv, which is read before any shard; choose another folder for --out.")
    sizes = [sum(os.path.getsize(name) for name in names if name) for names in zip(index.image, index["mask"])]
    shards = list(_runs(sizes, shard_bytes))
    paths = [out / f"{number:05}-of-{len(shards):05}-{title}.parquet" for number in range(len(shards))]
    if others := set(out.glob("*.parquet")) - set(paths):
        raise SystemExit(f"{out} has other shards, such as {min(others).name}; choose another folder for --out.")
    out.mkdir(parents=True, exist_ok=True)
    schema = pa.schema({name: pa.string() for name in index} | dict.fromkeys(_FILES.values(), pa.binary()))
    for path, rows in zip(paths, tqdm(shards, "writing", unit="shard")):
        if path.exists():
            continue
        part = path.with_suffix(".part")
        with pq.ParquetWriter(
            part,
            schema,
            compression={name: "zstd" if name in index else "none" for name in schema.names},  # films are packed
            use_dictionary=list(index),
            write_statistics=list(index),
            write_page_checksum=True,
        ) as writer:
            for group in _runs(sizes[rows.start : rows.stop], group_bytes):
                some = index.iloc[rows.start + group.start : rows.start + group.stop]
                held = {file: [_bytes(name) for name in some[column]] for column, file in _FILES.items()}
                writer.write_table(pa.table({name: some[name].tolist() for name in index} | held, schema))
        part.replace(path)
    return paths


def _runs(sizes: list[int], most: int) -> Iterator[range]:
    """Consecutive positions of which each run has no more than `most` in all, or is a single one."""
    start, held = 0, 0
    for i, size in enumerate(sizes):
        if i > start and held + size > most:
            yield range(start, i)
            start, held = i, 0
        held += size
    yield range(start, len(sizes))


def _bytes(name: str) -> bytes | None:
    return Path(name).read_bytes() if name else None


def list_shards(data: str | Path) -> list[str]:
    """Path or address of each shard in a folder, or at an address of fsspec, in order; [] where there is none.

    Raises:
        SystemExit: the address cannot be listed, or a shard is missing.
    """
    data = str(data)
    try:
        system, path = file_system(data)
        names = system.find(path, maxdepth=1)
    except SourceError as error:
        raise SystemExit(str(error)) from None
    except Exception as error:  # each kind of store has its own
        raise SystemExit(f"{data} cannot be listed ({type(error).__name__}).") from None
    found = {match: name for name in names if (match := _NAME.fullmatch(name.rsplit("/", 1)[-1]))}
    sets: dict[tuple[str, int], set[int]] = {}
    for match in found:
        sets.setdefault((match[3], int(match[2])), set()).add(int(match[1]))
    for (title, count), numbers in sets.items():
        if missing := set(range(count)) - numbers:
            name = f"{min(missing):05}-of-{count:05}-{title}.parquet"
            raise SystemExit(f"{data} lacks {len(missing)} of {count} shards, the first of them {name}.")
    order = sorted(found, key=lambda match: (match[3], int(match[1])))
    return [system.unstrip_protocol(found[match]) if "://" in data else found[match] for match in order]


def shard_state(shard: str) -> str:
    """Changes whenever a shard does: its size and time, or what else its store tells of it."""
    system, path = file_system(shard)
    return system.ukey(path)


def read_shard_index(shards: list[str]) -> pd.DataFrame:
    """The rows of all shards, as `data.read_index` gives them; `open_file` takes their images and masks.

    Raises:
        SystemExit: a shard is damaged.
    """
    parts = []
    for shard in shards:
        with _told(shard):
            file = _parquet(shard)
            columns = [name for name in file.schema_arrow.names if name not in _FILES.values()]
            part = file.read(columns).to_pandas().fillna("").astype(str)
        for column in _FILES.keys() & set(columns):
            names = part[column]
            part[column] = [f"{shard}::{row}::{column}" if name else "" for row, name in enumerate(names)]
        parts.append(part)
    return pd.concat(parts, ignore_index=True).fillna("")


def shard_of(name: str) -> str:
    """The shard in which an image or a mask of an index lies; "" for a file of its own."""
    return name.rsplit("::", 2)[0] if name.endswith(_IN_SHARD) else ""


def open_file(name: str) -> str | io.BytesIO:
    """What `load_xray` and Pillow read of an image or a mask of an index: a path as it is, a file in a shard as bytes.

    Raises:
        SystemExit: the shard is damaged.
    """
    if not (shard := shard_of(name)):
        return name
    row, column = name.rsplit("::", 2)[1:]
    with _told(shard):
        starts = _starts(shard)
        group = int(np.searchsorted(starts, int(row), "right")) - 1
        return io.BytesIO(_group(shard, group)[_FILES[column]][int(row) - starts[group]].as_py())


@contextmanager
def _told(shard: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each kind of store and of damage has its own
        raise SystemExit(f"The shard {shard} cannot be read ({type(error).__name__}); write it again.") from None


@lru_cache(maxsize=4)
def _parquet(shard: str) -> pq.ParquetFile:
    system, path = file_system(shard)
    return pq.ParquetFile(system.open(path, "rb"), page_checksum_verification=True)


@lru_cache(maxsize=4)
def _starts(shard: str) -> np.ndarray:
    """The first row of each row group, (G,)."""
    metadata = _parquet(shard).metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.cumsum([0, *rows])[:-1]


@lru_cache(maxsize=2)
def _group(shard: str, group: int) -> pa.Table:
    return _parquet(shard).read_row_group(group, list(_FILES.values()))
