"""Make the index of X-rays that every other verb reads.

    python -m train.prepare --data ROOT --out DIR

If ROOT has an index.csv, it is checked and copied with absolute paths.
Otherwise the public sets are looked for below ROOT, in the layouts in which
they are published, and split 8:1:1 by patients.
"""

import argparse
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from manet_core import CLASSES

from .data import COLUMNS, read_index

LABELS = (*CLASSES, "Pneumonia (unspecified)")
SPLITS = ("train", "val", "test", "external")
LAYOUTS = """\
  Kermany     chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg
  Shenzhen    ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png, masks in a folder mask or masks as CHNCXR_0001_0_mask.png
  Montgomery  MontgomerySet/CXR_png/MCUCXR_0001_0.png, masks in ManualMask/leftMask and ManualMask/rightMask
  ieee8023    covid-chestxray-dataset/metadata.csv and images/"""

_KERMANY = re.compile(r"(?P<person>person\d+)_(?P<kind>bacteria|virus)_\d+|(?P<normal>(?:NORMAL2-)?IM-\d+)-[\d-]+")
_NLM = re.compile(r"(?P<set>CHNCXR|MCUCXR)_(?P<number>\d+)_(?P<tb>[01])(?P<mask>_mask)?")
_FRONTAL = re.compile(r"(PA|AP|APS)\b")
_MOST_REPORTED = 20  # violations of one kind


def violations(index: pd.DataFrame) -> list[str]:
    """One sentence for each thing wrong with an index as `read_index` gives it."""
    kinds = [
        [f"{row.image} has the label {row.label!r}, which is none of {', '.join(LABELS)}."
         for row in index[~index.label.isin(LABELS)].itertuples()],
        [f"{row.image} has the split {row.split!r}, which is none of {', '.join(SPLITS)}."
         for row in index[~index.split.isin(SPLITS)].itertuples()],
        [f"{image} has no patient." for image in index.image[index.patient == ""]],
        [f"{image} is listed more than once." for image in index.image[index.image.duplicated()].unique()],
        [f"The patient {patient} is in several splits: {', '.join(sorted(set(splits)))}."
         for patient, splits in index[index.patient != ""].groupby("patient").split if splits.nunique() > 1],
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
    rows, masks, unknown = {}, {}, []
    for path in _files(root, out):
        if row := _kermany(path):
            rows.setdefault(("kermany", path.parts[-3:]), row)  # some archives hold the whole set twice
        elif match := _NLM.fullmatch(path.stem):
            if path.suffix.lower() != ".png":
                continue
            name = path.stem.removesuffix("_mask")
            folder = path.parent.name.lower()
            if match["mask"] or folder in ("mask", "masks", "leftmask", "rightmask"):
                masks.setdefault(name, {}).setdefault(folder.removesuffix("s"), path)
            else:
                source = "shenzhen" if match["set"] == "CHNCXR" else "montgomery"
                label = "Tuberculosis" if match["tb"] == "1" else "Normal"
                rows.setdefault((source, name), _row(path, label, source, match["number"]))
        elif path.name == "metadata.csv":
            for row in _ieee8023(path):
                rows.setdefault(("ieee8023", Path(row["image"]).name), row)
        elif _in_kermany(path):
            unknown.append(path)
    if unknown:
        print(f"{len(unknown)} files have names that are not known, such as {unknown[0]}; they are left out.")
    if not rows:
        raise SystemExit(f"There is no index.csv in {root}, and none of these below it:\n{LAYOUTS}")
    for (_, name), row in tqdm(sorted(rows.items()), "uniting masks", unit="X-ray", delay=1):
        row["mask"] = _mask(masks.get(name, {}), out / "masks" / f"{name}.png")
    return pd.DataFrame([row for _, row in sorted(rows.items())], columns=COLUMNS)


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
    for label in LABELS:
        for source in sorted(index.source[index.label == label].unique()):
            cells = [index[(index.label == label) & (index.source == source) & (index.split == s)] for s in SPLITS]
            counts = (f"{len(cell)} ({cell.patient.nunique()})" if len(cell) else "–" for cell in cells)
            lines.append(f"{label:<24}{source:<14}" + "".join(f"{count:>16}" for count in counts))
    counts = (f"{len(cell)} ({cell.patient.nunique()})" for cell in (index[index.split == s] for s in SPLITS))
    lines.append(f"{'all: images (patients)':<38}" + "".join(f"{count:>16}" for count in counts))
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


def _row(image: Path, label: str, source: str, patient: str, split: str = "") -> dict[str, str]:
    return dict(image=str(image), mask="", label=label, source=source, patient=f"{source}-{patient}", split=split)


def _in_kermany(path: Path) -> bool:
    split, kind = path.parts[-3:-1] if len(path.parts) > 2 else ("", "")
    jpeg = path.suffix.lower() in (".jpeg", ".jpg")
    return jpeg and split in ("train", "val", "test") and kind in ("NORMAL", "PNEUMONIA")


def _kermany(path: Path) -> dict[str, str] | None:
    """The row of a picture of the Kermany set, None for any other file.

    Its train and test folders number people separately, val goes on where
    train ends. Within each, bacteria and virus share one series, and numbers
    that have both may be one person: they stay together, which can only waste
    a little balance, whereas parting them could leak a patient into the test.
    """
    match = _KERMANY.fullmatch(path.stem)
    if not (match and _in_kermany(path)) or (path.parent.name == "NORMAL") != bool(match["normal"]):
        return None
    series = "test" if path.parts[-3] == "test" else "train"
    label = {None: "Normal", "bacteria": "Bacterial pneumonia", "virus": "Viral pneumonia"}[match["kind"]]
    return _row(path, label, "kermany", f"{series}-{match['person'] or match['normal']}")


def _ieee8023(metadata: Path) -> Iterator[dict[str, str]]:
    """Rows of the frontal X-rays in covid-chestxray-dataset that show COVID-19 or another named pneumonia."""
    table = pd.read_csv(metadata, dtype=str, keep_default_na=False)
    table.columns = table.columns.str.strip().str.lower()
    if not {"patientid", "finding", "view", "filename"} <= set(table):
        return
    missing = 0
    for entry in table.to_dict("records"):
        names = {name.strip() for name in re.split("[/,]", entry["finding"])}
        if "COVID-19" in names:
            label, split = "COVID-19", ""
        elif "Bacterial" in names or "Viral" in names:
            label, split = ("Bacterial" if "Bacterial" in names else "Viral") + " pneumonia", "external"
        elif names == {"Pneumonia"}:
            label, split = "Pneumonia (unspecified)", "external"
        else:
            continue
        if entry.get("modality", "X-ray").strip() != "X-ray" or not _FRONTAL.match(entry["view"].strip()):
            continue
        image = metadata.parent / (entry.get("folder") or "images") / entry["filename"]
        if image.is_file():
            yield _row(image, label, "ieee8023", entry["patientid"].strip(), split)
        else:
            missing += 1
    if missing:
        print(f"{metadata} lists {missing} frontal X-rays that are not in its images folder; they are left out.")


def _mask(parts: dict[str, Path], united: Path) -> str:
    """Path of an X-ray's one mask, "" if none: the file there is, or the union of both lungs', written to `united`."""
    if "mask" in parts:
        return str(parts["mask"])
    if not {"leftmask", "rightmask"} <= set(parts):
        return ""
    left, right = (np.asarray(Image.open(parts[side]).convert("L")) > 127 for side in ("leftmask", "rightmask"))
    united.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(left | right).save(united)
    return str(united)


def main() -> None:
    """Check or make an index from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=os.environ.get("MANET_DATA", "data"), type=Path, help="ROOT; also MANET_DATA")
    p.add_argument("--out", required=True, type=Path, help="DIR, where index.csv goes")
    p.add_argument("--seed", default=0, type=int, help="of the split, where there is none yet")
    args = p.parse_args()
    root, out = args.data.absolute(), args.out.absolute()
    if not root.is_dir():
        raise SystemExit(f"There is no folder {root}.")
    if (root / "index.csv").is_file():
        if root.resolve() == out.resolve():
            raise SystemExit(f"{root} has an index.csv already; choose another folder for --out.")
        index = read_index(root)
        if found := violations(index):
            raise SystemExit("\n".join(found))
    else:
        index = find(root, out)
        index["split"] = split(index, args.seed)
    print(composition(index))
    out.mkdir(parents=True, exist_ok=True)
    part = out / "index.csv.part"
    index[COLUMNS].to_csv(part, index=False)
    part.replace(out / "index.csv")
    print(f"{out / 'index.csv'} is written; use --data {args.out} from here on.")


if __name__ == "__main__":
    main()
