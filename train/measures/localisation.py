"""Do heatmaps point at the lesion? Against radiologists' masks, and against another X-ray's heatmap."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from manet_core import Pipeline, load_xray
from manet_core.explain import get_explainer
from manet_core.preprocess import resize
from manet_core.tasks import get_task

from ..data import read_index
from .markdown import number, percent, table
from .statistics import bootstrap_weights, mean, proportion
from .study import NotMeasured, Study

TITLE = "Localisation"
TEXT = """\
Heatmaps of the true class on X-rays with radiologists' masks of ground-glass opacity and consolidation, taken together.
Enrichment: the lesion's share of the heatmap inside the lungs over its share of the lung area; 1 is chance. A network
that shows the same blob on every X-ray has a high figure where lesions are often, so *another X-ray's heatmap* is the
same with the heatmap of another patient, and the difference is what the heatmap knows of this X-ray. Pointing: share of
X-rays on which the hottest point inside the lungs lies on the lesion; chance is the lesion's share of the lungs. Lungs
are the network's own mask. Most of these X-rays are in the training split, but without their lesions."""


@dataclass(frozen=True)
class Lesion:
    """An X-ray with a lesion that somebody outlined.

    Attributes:
        image: file of the X-ray.
        label: what the index says that it shows.
        patient: whose it is.
        masks: files of the outlines, to be united.
    """

    image: Path
    label: str
    patient: str
    masks: tuple[Path, ...]

    def outline(self, shape: tuple[int, int]) -> np.ndarray:
        """The union of all outlines, (H, W) bool."""
        found = np.zeros(shape, bool)
        for path in self.masks:
            found |= resize(np.asarray(Image.open(path).convert("1"), np.float32), shape) > 0.5
        return found


def read_lesions(data: Path) -> list[Lesion]:
    """The rows of `data`/lesions.csv (columns image, label, and one a kind of lesion: ggo, consolidation).

    Raises:
        NotMeasured: there is no such file.
    """
    path = Path(data) / "lesions.csv"
    if not path.is_file():
        raise NotMeasured(f"there is no {path}")
    lesions = pd.read_csv(path, dtype=str, keep_default_na=False)
    index = read_index(data)
    patients = dict(zip((str(Path(name).resolve()) for name in index.image), index.patient))
    out = []
    for row in lesions.to_dict("records"):
        image = (Path(data) / row["image"]).resolve()
        masks = tuple(Path(data) / row[kind] for kind in ("ggo", "consolidation") if row.get(kind))
        out.append(Lesion(image, row["label"], patients.get(str(image), row["image"]), masks))
    return out


def others(patients: list[str], seed: int = 0) -> np.ndarray:
    """For each of N X-rays another one, (N,): the list in random order, rotated until no one meets the same patient.

    With too few patients for that, the rotation at which the fewest do.
    """
    order = np.random.default_rng(seed).permutation(len(patients))
    names = np.array(patients)[order]
    met = [(np.roll(names, shift) == names).sum() for shift in range(1, len(names))]
    other = np.empty(len(names), int)
    other[order] = np.roll(order, 1 + int(np.argmin(met)))
    return other


def enrichment(heat: np.ndarray, lungs: np.ndarray, lesion: np.ndarray) -> float:
    """The lesion's share of the heatmap's mass inside the lungs over its share of the lung area, all (H, W).

    NaN where heatmap or lesion have nothing inside the lungs.
    """
    inside, both = heat[lungs].sum(), lungs & lesion
    if inside <= 0 or not both.any():
        return float("nan")
    return float((heat[both].sum() / inside) / (both.sum() / lungs.sum()))


def pointing(heat: np.ndarray, lungs: np.ndarray, lesion: np.ndarray) -> bool:
    """Whether the hottest point inside the lungs lies on the lesion; an empty heatmap points nowhere."""
    masked = np.where(lungs, heat, 0)
    return bool(masked.max(initial=0) > 0 and lesion.flat[int(masked.argmax())])


def localise(heats: list[np.ndarray], lungs: list[np.ndarray], lesions: list[np.ndarray], patients: list[str]) -> dict:
    """All figures of one network and explainer, from N heatmaps, masks and outlines, each of its X-ray's (H, W)."""
    swapped = [resize(heats[j], heats[i].shape) for i, j in enumerate(others(patients))]
    own = np.array([enrichment(*each) for each in zip(heats, lungs, lesions)])
    other = np.array([enrichment(*each) for each in zip(swapped, lungs, lesions)])
    hit = np.array([pointing(*each) for each in zip(heats, lungs, lesions)])
    other_hit = np.array([pointing(*each) for each in zip(swapped, lungs, lesions)])
    weights = bootstrap_weights(np.array(patients))
    names = np.array(patients)
    return {
        "n": int(np.isfinite(own).sum()),
        "enrichment": mean(own, weights),
        "enrichment_other": mean(other, weights),
        "enrichment_minus_other": mean(own - other, weights),
        "pointing": proportion(hit, names),
        "pointing_other": proportion(other_hit, names),
        "pointing_minus_other": mean(hit.astype(float) - other_hit, weights),
    }


def measure(study: Study) -> dict:
    """{"n", "patients", "covered", "lesion_share", "models": {network: {explainer: `localise`}}}.

    "covered" is the share of the lesion inside the predicted lungs, "lesion_share" its share of them.
    """
    lesions = read_lesions(study.data)
    names = [name for names in study.tasks.values() for name in names]
    if not names:
        raise NotMeasured("no network gives one answer")
    pipe = Pipeline.load(study.weights, names, study.device)
    heats: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    lungs, outlines = [], []
    for i, lesion in enumerate(tqdm(lesions, "lesions", unit="X-ray")):
        x = load_xray(lesion.image)
        lungs.append((found := pipe.analyze(x, models=[])).mask)
        outlines.append(lesion.outline(x.pixels.shape))
        for explainer in study.explainers:
            analysis = pipe.analyze(x, lungs=found.segmentation, explainer=explainer)
            for name in names:
                task = get_task(study.entries[name]["task"])
                allowed = np.flatnonzero(task.target(lesion.label))
                if len(allowed) == 1:
                    heat = analysis.heatmap(name, task.classes[allowed[0]])
                    heats.setdefault((name, explainer), {})[i] = heat.astype(np.float16)
    models: dict[str, dict] = {}
    for (name, explainer), found in heats.items():
        at = list(found)
        models.setdefault(name, {})[explainer] = localise(
            [found[i].astype(np.float32) for i in at],
            [lungs[i] for i in at],
            [outlines[i] for i in at],
            [lesions[i].patient for i in at],
        )
    patients = np.array([lesion.patient for lesion in lesions])
    weights = bootstrap_weights(patients)
    covered = np.array([(a & b).sum() / max(1, b.sum()) for a, b in zip(lungs, outlines)])
    share = np.array([(a & b).sum() / max(1, a.sum()) for a, b in zip(lungs, outlines)])
    return {
        "n": len(lesions),
        "patients": len(set(patients)),
        "covered": mean(covered, weights),
        "lesion_share": mean(share, weights),
        "models": models,
    }


def lines(evidence: dict) -> list[str]:
    """A row for each network and explainer."""
    found = evidence["localisation"]
    about = (
        f"{found['n']} X-rays of {found['patients']} patients. The lesions cover {percent(found['lesion_share'])} % of "
        f"the lungs, and {percent(found['covered'])} % of a lesion lies inside the predicted lungs."
    )
    rows = []
    for name, of in found["models"].items():
        for explainer, m in of.items():
            enriched = [number(m[key], 2) for key in ("enrichment", "enrichment_other", "enrichment_minus_other")]
            pointed = [percent(m[key]) for key in ("pointing", "pointing_other", "pointing_minus_other")]
            rows.append([f"`{name}`", get_explainer(explainer).title, m["n"], *enriched, *pointed])
    head = ["network", "heatmap", "n", "enrichment (95 % CI)", "another X-ray's heatmap", "difference"]
    head += ["pointing, % (95 % CI)", "another X-ray's heatmap", "difference, points"]
    return [TEXT, "", about, "", *table(head, rows)]
