"""Make the index of X-rays that every other verb reads.

    python -m train.prepare --data ROOT --out DIR
    python -m train.prepare shards --data DATA --out DIR   # the index and its files as Parquet (`train.shards`)

If ROOT has an index.csv, it is checked and copied with absolute paths.
Otherwise the public sets are looked for below ROOT, in the layouts in which
they are published, and split 8:1:1 by patients.
"""

import argparse
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from manet_core.tasks import get_task, list_tasks

from . import run_verb
from .data import COLUMNS, fingerprint, read_index
from .shards import write_shards
from .sources import CONVENTIONS, Film, get_source, list_sources

SPLITS = ("train", "val", "test", "external", "pretrain")
OTHER = "Other finding"  # the label of an X-ray that shows something else than any task knows
_MOST_REPORTED = 20  # violations of one kind


def known_labels() -> list[str]:
    """Every label that some task can learn from, and `OTHER`."""
    tasks = [task for task in map(get_task, list_tasks()) if task.column == "label"]
    return [*dict.fromkeys(label for task in tasks for label in (*task.classes, *task.labels)), OTHER]


def violations(index: pd.DataFrame) -> list[str]:
    """One sentence for each thing wrong with an index as `read_index` gives it."""
    labels = known_labels()
    apart = index[index.patient != ""].assign(split=index.split.replace("pretrain", "train"))  # both are trained on
    kinds = [
        [f"{row.image} has the label {row.label!r}, which is none of {', '.join(labels)}."
         for row in index[~index.label.isin(labels)].itertuples()],
        [f"{row.image} has the split {row.split!r}, which is none of {', '.join(SPLITS)}."
         for row in index[~index.split.isin(SPLITS)].itertuples()],
        [f"{image} has no patient." for image in index.image[index.patient == ""]],
        [f"{image} is listed more than once." for image in index.image[index.image.duplicated()].unique()],
        [f"The patient {patient} is in several splits: {', '.join(sorted(set(splits)))}."
         for patient, splits in apart.groupby("patient").split if splits.nunique() > 1],
    ]  # fmt: skip
    for column in ("image", "mask"):
        names = tqdm(index[column][index[column] != ""], f"checking each {column}", unit="file", delay=1)
        kinds.append([f"There is no {column} {name}." for name in names if not os.path.isfile(name)])
    found = []
    for kind in kinds:
        found += kind[:_MOST_REPORTED]
        if len(kind) > _MOST_REPORTED:
            found.append(f"And so on: {len(kind) - _MOST_REPORTED} more of this kind.")
    return found


def find(root: Path, out: Path) -> pd.DataFrame:
    """The public sets below `root`: an index without splits, but "external" where that is settled.

    Args:
        root: searched to any depth, symbolic links included.
        out: not searched; united masks are written to `out`/masks.
    """
    files = list(_files(root, out))
    rows = []
    for source in map(get_source, sorted(list_sources())):
        films: dict[tuple[str, ...], Film] = {}
        for film in source.find(files) if source.find else ():
            films.setdefault(film.key, film)  # some archives hold a whole set twice
        for _, film in tqdm(sorted(films.items()), f"uniting masks of {source.name}", unit="X-ray", delay=1):
            mask = _mask(film.masks, out / "masks" / f"{film.image.stem}.png")
            rows.append({
                "image": str(film.image), "mask": mask, "label": film.label, "source": source.name,
                "patient": f"{source.name}-{film.patient}", "split": film.split,
            })  # fmt: skip
    if not rows:
        layouts = [(source.name, source.layout) for source in map(get_source, list_sources()) if source.layout]
        lines = [f"  {name:<12}{layout}" for name, layout in layouts]
        raise SystemExit("\n".join([f"There is no index.csv in {root}, and none of these below it:", *lines]))
    return pd.DataFrame(rows, columns=COLUMNS)


def split(index: pd.DataFrame, seed: int = 0) -> pd.Series:
    """Splits 8:1:1 of whole patients, drawn separately for each source and label.

    A patient's place depends on the seed, its own name and the others of its
    source and label alone: neither the order of files nor another class moves
    it. A patient of whom any picture is "external" is external altogether.
    """
    patients = index.groupby("patient").agg(
        source=("source", "first"),
        labels=("label", lambda labels: " + ".join(sorted(set(labels)))),
        images=("label", "size"),
        external=("split", lambda splits: (splits == "external").any()),
    )
    patients["split"] = "external"
    patients["draw"] = [hashlib.sha256(f"{seed} {name}".encode()).hexdigest() for name in patients.index]
    for _, group in patients[~patients.external].sort_values("draw").groupby(["source", "labels"]):
        middle = (group.images.cumsum() - group.images / 2) / group.images.sum()
        patients.loc[group.index, "split"] = np.select([middle < 0.8, middle < 0.9], ["train", "val"], "test")
    return index.patient.map(patients.split)


def composition(index: pd.DataFrame) -> str:
    """A table of label and source by split: images, and patients in brackets."""
    lines = [f"{'label':<24}{'source':<14}" + "".join(f"{s:>16}" for s in SPLITS)]
    for label in known_labels():
        for source in sorted(index.source[index.label == label].unique()):
            cells = [index[(index.label == label) & (index.source == source) & (index.split == s)] for s in SPLITS]
            counts = (f"{len(cell)} ({cell.patient.nunique()})" if len(cell) else "–" for cell in cells)
            lines.append(f"{label:<24}{source:<14}" + "".join(f"{count:>16}" for count in counts))
    counts = (f"{len(cell)} ({cell.patient.nunique()})" for cell in (index[index.split == s] for s in SPLITS))
    lines.append(f"{'all: images (patients)':<38}" + "".join(f"{count:>16}" for count in counts))
    return "\n".join(lines)


def credits(index: pd.DataFrame) -> str:
    """A line on each source of an index: who made it, of whom, which masks, and its licence."""
    lines = []
    for name in sorted(index.source.unique()):
        if name not in list_sources():
            lines.append(f"{name}: not known to train.sources; see to its licence yourself.")
            continue
        source = get_source(name)
        masks = f"; masks: {CONVENTIONS[source.convention]}" if source.convention else ""
        lines.append(f"{name}: {source.title}; {source.people}{masks}; licence: {source.licence}.")
    return "\n".join(lines)


def _files(root: Path, out: Path) -> Iterator[Path]:
    """All files below `root` in sorted order, without hidden ones and those in `out`; each folder once."""
    seen = {out.resolve()} - {root.resolve()}
    for folder, folders, files in tqdm(os.walk(root, followlinks=True), "looking", unit="folder", delay=1):
        real = Path(folder).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _mask(parts: tuple[Path, ...], united: Path) -> str:
    """Path of an X-ray's one mask, "" if none: the file there is, or the union of several, written to `united`."""
    if len(parts) < 2:
        return str(parts[0]) if parts else ""
    lungs = [np.asarray(Image.open(part).convert("L")) > 127 for part in parts]
    united.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.logical_or.reduce(lungs)).save(united)
    return str(united)


def _refuse(index: pd.DataFrame) -> None:
    if found := violations(index):
        raise SystemExit("\n".join(found))


def main() -> None:
    """Check or make an index from the command line, or pack one as shards."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", nargs="?", choices=("index", "shards"), default="index", help="what is made; index")
    p.add_argument("--data", default=os.environ.get("MANET_DATA", "data"), type=Path, help="ROOT; also MANET_DATA")
    p.add_argument("--out", required=True, type=Path, help="DIR, where index.csv or the shards go")
    p.add_argument("--seed", default=0, type=int, help="of the split, where there is none yet")
    args = p.parse_args()
    root, out = args.data.absolute(), args.out.absolute()
    if not root.is_dir():
        raise SystemExit(f"There is no folder {root}.")
    if args.kind == "shards":
        index = read_index(root)
        _refuse(index)
        shards = write_shards(index, fingerprint(index), out)
        print(f"{len(index)} X-rays are in {len(shards)} shard(s) in {out}; use --data {args.out} from here on.")
        return
    if (root / "index.csv").is_file():
        if root.resolve() == out.resolve():
            raise SystemExit(f"{root} has an index.csv already; choose another folder for --out.")
        index = read_index(root)
        _refuse(index)
    else:
        index = find(root, out)
        index["split"] = split(index, args.seed)
    print(composition(index), credits(index), sep="\n\n")
    asked = [task.column for task in map(get_task, list_tasks())]
    columns = list(dict.fromkeys([*COLUMNS, *(column for column in asked if column in index)]))
    out.mkdir(parents=True, exist_ok=True)
    part = out / "index.csv.part"
    index[columns].to_csv(part, index=False, encoding="utf-8")
    part.replace(out / "index.csv")
    print(f"{out / 'index.csv'} is written; use --data {args.out} from here on.")


if __name__ == "__main__":
    run_verb(main)
