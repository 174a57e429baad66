"""Where X-rays come from: one row a source, and the function that reads its folder as it is published.

Everything that differs between sources is here: who the people are, which part of a lung its annotators drew, the
licence, and how file names and tables tell labels and patients. `register_source` adds one from outside.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

CONVENTIONS = {
    "aerated": "lung behind the heart left out",
    "whole": "lung behind heart and diaphragm, and opacified lung, included",
}


@dataclass(frozen=True)
class Film:
    """An X-ray that a source's folder holds.

    Attributes:
        key: orders and names the X-rays of a source; of several with one key, the first counts.
        image: its file.
        label: what the source says that it shows.
        patient: the source's own name of the person, or of what stands for one.
        split: "external" if it must never be trained on, otherwise "".
        masks: files of its lung mask: none, one, or several to be united.
    """

    key: tuple[str, ...]
    image: Path
    label: str
    patient: str
    split: str = ""
    masks: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """One collection of X-rays.

    Attributes:
        name: in the column `source` of an index.
        title: how people cite it.
        people: "children" or "adults".
        licence: as its publishers state it.
        convention: which part of a lung its masks show, one of `CONVENTIONS`; "" if it has none.
        masks_with: another source whose masks were drawn in the same way, so that both are measured together.
        layout: the files that `find` looks for, in one line; "" if X-rays of this source come with an index only.
        find: yields the X-rays among all files below a folder.
    """

    name: str
    title: str
    people: str
    licence: str
    convention: str = ""
    masks_with: str = ""
    layout: str = ""
    find: Callable[[list[Path]], Iterable[Film]] | None = None


_SOURCES: dict[str, Source] = {}


def register_source(source: Source) -> Source:
    """Add a source; its name must be new.

    Raises:
        ValueError: there is a source of this name already, or its convention or people are unknown.
    """
    if source.name in _SOURCES:
        raise ValueError(f"There is a source {source.name!r} already.")
    if source.convention and source.convention not in CONVENTIONS:
        raise ValueError(f"There is no convention {source.convention!r}; choose one of: {', '.join(CONVENTIONS)}.")
    if source.people not in ("children", "adults"):
        raise ValueError(f"The people of {source.name} are children or adults, not {source.people!r}.")
    _SOURCES[source.name] = source
    return source


def get_source(name: str) -> Source:
    """The source of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _SOURCES:
        raise ValueError(f"There is no source {name!r}; there are: {', '.join(_SOURCES)}.")
    return _SOURCES[name]


def list_sources() -> list[str]:
    """The names of all sources."""
    return list(_SOURCES)


def mask_group(name: str) -> str:
    """The name under which masks of a source are measured: "shenzhen + montgomery" for each of the two.

    A source that is not registered is a group of its own.
    """
    first = _SOURCES[name].masks_with or name if name in _SOURCES else name
    return " + ".join([first, *(source.name for source in _SOURCES.values() if source.masks_with == first)])


def people_of(name: str) -> str:
    """Whose X-rays a source holds, "children" or "adults"; adults where that is not known."""
    return _SOURCES[name].people if name in _SOURCES else "adults"


def convention_of(name: str) -> str:
    """Which part of a lung the masks of a source show, one of `CONVENTIONS`; "" where that is not known."""
    return _SOURCES[name].convention if name in _SOURCES else ""


# --- the folders as they are published ------------------------------------------------------------------------------

_KERMANY = re.compile(r"(?P<person>person\d+)_(?P<kind>bacteria|virus)_\d+|(?P<normal>(?:NORMAL2-)?IM-\d+)-[\d-]+")
_NLM = re.compile(r"(?P<set>CHNCXR|MCUCXR)_(?P<number>\d+)_(?P<tb>[01])(?P<mask>_mask)?")
_FRONTAL = re.compile(r"(PA|AP|APS)\b")


def kermany(files: list[Path]) -> Iterator[Film]:
    """The Kermany set: the folder tells split and kind, the file name the person.

    Its train and test folders number people separately, val goes on where
    train ends. Within each, bacteria and virus share one series, and numbers
    that have both may be one person: they stay together, which can only waste
    a little balance, whereas parting them could leak a patient into the test.
    """
    unknown = []
    for path in files:
        split, kind = path.parts[-3:-1] if len(path.parts) > 2 else ("", "")
        jpeg = path.suffix.lower() in (".jpeg", ".jpg")
        if not jpeg or split not in ("train", "val", "test") or kind not in ("NORMAL", "PNEUMONIA"):
            continue
        match = _KERMANY.fullmatch(path.stem)
        if not match or (kind == "NORMAL") != bool(match["normal"]):
            unknown.append(path)
            continue
        series = "test" if split == "test" else "train"
        label = {None: "Normal", "bacteria": "Bacterial pneumonia", "virus": "Viral pneumonia"}[match["kind"]]
        yield Film(path.parts[-3:], path, label, f"{series}-{match['person'] or match['normal']}")
    if unknown:
        print(f"{len(unknown)} files have names that are not known, such as {unknown[0]}; they are left out.")


def nlm(prefix: str) -> Callable[[list[Path]], Iterator[Film]]:
    """Reads one of the two sets of the National Library of Medicine, whose file names begin with `prefix`."""

    def find(files: list[Path]) -> Iterator[Film]:
        images, masks = {}, {}
        for path in files:
            match = _NLM.fullmatch(path.stem)
            if not match or match["set"] != prefix or path.suffix.lower() != ".png":
                continue
            folder = path.parent.name.lower()
            name = path.stem.removesuffix("_mask")
            if match["mask"] or folder in ("mask", "masks", "leftmask", "rightmask"):
                masks.setdefault(name, {}).setdefault(folder.removesuffix("s"), path)
            else:
                images.setdefault(name, (path, match))
        for name, (path, match) in images.items():
            parts = masks.get(name, {})
            drawn = tuple(parts[side] for side in ("leftmask", "rightmask") if side in parts)
            whole = (parts["mask"],) if "mask" in parts else drawn if len(drawn) == 2 else ()
            label = "Tuberculosis" if match["tb"] == "1" else "Normal"
            yield Film((name,), path, label, match["number"], masks=whole)

    return find


def ieee8023(files: list[Path]) -> Iterator[Film]:
    """Frontal X-rays in covid-chestxray-dataset that show COVID-19 or another named pneumonia."""
    for metadata in (path for path in files if path.name == "metadata.csv"):
        table = pd.read_csv(metadata, dtype=str, keep_default_na=False)
        table.columns = table.columns.str.strip().str.lower()
        if not {"patientid", "finding", "view", "filename"} <= set(table):
            continue
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
                yield Film((image.name,), image, label, entry["patientid"].strip(), split)
            else:
                missing += 1
        if missing:
            print(f"{metadata} lists {missing} frontal X-rays that are not in its images folder; they are left out.")


# --- the sources ----------------------------------------------------------------------------------------------------

for _source in (
    Source(
        "kermany",
        "Kermany et al. 2018",
        people="children",
        licence="CC BY 4.0",
        convention="whole",
        layout="chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg",
        find=kermany,
    ),
    Source(
        "shenzhen",
        "NLM Shenzhen (Jaeger et al. 2014)",
        people="adults",
        licence="cite NLM; masks CC BY-NC-SA 4.0",
        convention="aerated",
        layout="ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png, masks in a folder mask or masks as CHNCXR_0001_0_mask.png",
        find=nlm("CHNCXR"),
    ),
    Source(
        "montgomery",
        "NLM Montgomery (Jaeger et al. 2014)",
        people="adults",
        licence="cite NLM",
        convention="aerated",
        masks_with="shenzhen",
        layout="MontgomerySet/CXR_png/MCUCXR_0001_0.png, masks in ManualMask/leftMask and ManualMask/rightMask",
        find=nlm("MCUCXR"),
    ),
    Source(
        "ieee8023",
        "Cohen et al. (ieee8023) 2020",
        people="adults",
        licence="per image, many non-commercial",
        convention="whole",
        layout="covid-chestxray-dataset/metadata.csv and images/",
        find=ieee8023,
    ),
    Source("covidcxnet", "COVID-CXNet", "adults", "CC BY 4.0 claimed; research only"),
    Source("figure1", "Figure 1", "adults", "CC BY 4.0 claimed; research only"),
    Source("actualmed", "Actualmed", "adults", "CC BY 4.0 claimed; research only"),
    Source("nih", "NIH ChestX-ray8", "adults", "cite NIH"),
    Source("nih_more", "NIH ChestX-ray8", "adults", "cite NIH"),
    Source("nih128", "NIH ChestX-ray8", "adults", "cite NIH"),
    Source("rsna_normal", "RSNA 2018", "adults", "not verified"),
    Source("qatar_tb", "Qatar/Dhaka TB", "adults", "not verified"),
    Source("radiography_covid", "COVID-19 Radiography Database", "adults", "not verified"),
):
    register_source(_source)
