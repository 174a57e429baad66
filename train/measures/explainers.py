"""All explainers on the same X-rays: do they show what the network uses, do they find lesions, what do they cost?

The X-rays are those with outlined lesions. Each heatmap is kept in the cache once it is made, so that a measurement
that was interrupted goes on, and one of more X-rays makes only those that are new.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from manet_core import Pipeline, explain, load_xray
from manet_core.explain import DEFAULT, Explainer, get_explainer, list_explainers
from manet_core.explain.gradcam import scale_maps
from manet_core.networks.registry import split_name
from manet_core.pipeline import shown
from manet_core.preprocess import View
from manet_core.tasks import get_task
from manet_core.weights import fingerprint, sha256

from .heatmaps import erasure
from .localisation import Lesion, enrichment, read_lesions
from .markdown import number, table
from .statistics import bootstrap_weights, mean
from .study import NotMeasured, Study

TITLE = "Explainers"
KINDS = {  # of networks, the attentions that stand for each, the first that has weights
    "plain": ("",),
    "mask attention": ("ma",),
    "CBAM": ("cbam",),
    "AlexNet with attention": ("attn2", "attn1", "attn3"),
}
MEASURES = ("deletion", "insertion", "enrichment", "agreement")
OTHER = "another X-ray's Grad-CAM"
TEXT = """\
Heatmaps of the true class, made by every explainer for the same networks and X-rays with outlined lesions. Deletion and
insertion: the network's mean probability of the class while lung tissue is covered, or uncovered, hottest first; a
heatmap of what the network uses has a low deletion and a high insertion. Enrichment: the lesion's share of the heatmap
inside the lungs over its share of the lung area; 1 is chance. Agreement: rank correlation with Grad-CAM inside the
lungs. Seconds: of processor or GPU for one class of one X-ray, the median. *Another X-ray's Grad-CAM* is what any lungs
would give: an explainer that does no better knows nothing of this X-ray. Most of these X-rays are in the training
split, but without their lesions."""


class OneClass(nn.Module):
    """A classifier that is asked for one class alone, so that an explainer has one map to make.

    Args:
        net: a `networks.classifier.Classifier`, of which all else is found here, too.
        label: number of the class.
    """

    def __init__(self, net: nn.Module, label: int):
        super().__init__()
        self.net, self.label = net, label

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward_head(self, features: Tensor) -> Tensor:
        """The class's logit, (B, 1)."""
        return self.net.forward_head(features)[:, self.label : self.label + 1]

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """The class's logit, (B, 1)."""
        return self.net(image, mask)[:, self.label : self.label + 1]


def explained(
    net: nn.Module, image: Tensor, mask: Tensor, label: int, explainer: Explainer
) -> tuple[np.ndarray, float]:
    """The heatmap of one class, (S, S) float32 in [0, 1], for image and mask (1, S, S); and the seconds it took.

    On a CPU these are its own, whatever else it did meanwhile.
    """
    device = next(net.parameters()).device
    asked, image, mask = OneClass(net, label), image[None].to(device), mask[None].to(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    with torch.inference_mode():
        features = asked.forward_features(image, mask)
    _, maps = explainer.function(asked, image, mask, features)
    heat = scale_maps(maps, image.shape[-1])[0]
    return heat, clock() - start


def agreement(heat: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Rank correlation of two heatmaps inside the mask, all (S, S); NaN if one is even there."""
    a, b = heat[mask > 0], other[mask > 0]
    return float(spearmanr(a, b).statistic) if len(a) and np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def chosen(study: Study) -> dict[str, tuple[Study, str]]:
    """{one of `KINDS`: the set of weights and the network in it that stands for it}, of the study's or of those beside.

    Of several sets that have one, the study's own comes first.
    """
    found = {}
    for of in (study, *(replace(study, weights=path) for path in study.beside)):
        names = [name for names in of.tasks.values() for name in names]
        for kind, attentions in KINDS.items():
            ranked = [name for attention in attentions for name in names if split_name(name)[1] == attention]
            if ranked:
                found.setdefault(kind, (of, ranked[0]))
    return found


def label_of(lesion: Lesion, task: str) -> int | None:
    """The number of the one class of a task that an X-ray's label allows; None if there is not just one."""
    allowed = np.flatnonzero(get_task(task).target(lesion.label) == 1)
    return int(allowed[0]) if len(allowed) == 1 else None


def sample(lesions: list[Lesion], tasks: set[str], count: int, seed: int = 0) -> list[Lesion]:
    """At most `count` X-rays of which all tasks know the class, one of each patient, in random order."""
    order = np.random.default_rng(seed).permutation(len(lesions))
    known = [lesions[i] for i in order if all(label_of(lesions[i], task) is not None for task in tasks)]
    return list({lesion.patient: lesion for lesion in reversed(known)}.values())[::-1][:count]


def _programs() -> str:
    """What the cached heatmaps depend on beside weights and X-rays: the explainers' programs, not their registry."""
    found = hashlib.sha256()
    for path in sorted(Path(explain.__file__).parent.glob("[!_]*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _kept(study: Study, key: list, make: Callable[[], dict]) -> dict[str, np.ndarray]:
    """What `make` returned for this key, now or at an earlier time."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = Path(study.cache) / f"explained-{digest}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez_compressed(file, **make())
        part.replace(path)
    return dict(np.load(path))


@dataclass(frozen=True)
class Case:
    """An X-ray as one network is shown it, and what is asked of both.

    Attributes:
        net, image, mask: image and mask are (1, S, S) float32.
        outline: of the lesion, (S, S) bool.
        label: number of the true class.
        key: what says which network, X-ray and class these are.
    """

    net: nn.Module
    image: Tensor
    mask: Tensor
    outline: np.ndarray
    label: int
    key: list

    def heat(self, study: Study, explainer: str) -> dict[str, np.ndarray]:
        """{"heat": (S, S) float32, "seconds", "deletion", "insertion"} by an explainer."""

        def make() -> dict:
            heat, seconds = explained(self.net, self.image, self.mask, self.label, get_explainer(explainer))
            return {"heat": heat, "seconds": seconds} | self.erased(heat)

        return _kept(study, [*self.key, explainer], make)

    def erased(self, heat: np.ndarray) -> dict[str, float]:
        """{"deletion", "insertion"} by a heatmap (S, S)."""
        return dict(zip(MEASURES, erasure(self.net, self.image, self.mask, self.label, heat)))


def cases(networks: dict[str, tuple[Study, str]], lesions: list[Lesion]) -> Iterator[dict[str, Case]]:
    """For each X-ray {kind: its `Case`}."""
    sets = {of.weights: of for of, _ in networks.values()}
    pipes = {
        weights: Pipeline.load(weights, [name for other, name in networks.values() if other is of], of.device)
        for weights, of in sets.items()
    }
    programs = _programs()
    for lesion in lesions:
        x, out = load_xray(lesion.image), {}
        masks = {weights: pipe.analyze(x, models=[]).segmentation for weights, pipe in pipes.items()}
        for kind, (of, name) in networks.items():
            lungs, entry = masks[of.weights], of.entries[name]
            view, label = View.of(entry["preprocessing"]), label_of(lesion, entry["task"])
            cut = shown(x.pixels, lungs, view, view.sees)
            outline = view.cut(lesion.outline((view.working, view.working)).astype(np.float32), cut.box) > 0.5
            image, mask = (torch.from_numpy(array)[None] for array in (cut.seen, cut.mask.astype(np.float32)))
            key = [programs, fingerprint(entry), of.manifest["resunet"]["sha256"], sha256(lesion.image), label]
            out[kind] = Case(pipes[of.weights].classifiers[name], image, mask, outline, label, key)
        yield out


def measure(study: Study) -> dict:
    """{"n", "device", "models": {kind: {"network", "explainers": {explainer: figures}}}}, of another set "weights".

    Figures are the `MEASURES` with their intervals and "seconds"; those of `OTHER` have no seconds.
    """
    networks = chosen(study)
    if not networks:
        raise NotMeasured("no network gives one answer")
    tasks = {of.entries[name]["task"] for of, name in networks.values()}
    lesions = sample(read_lesions(study.data), tasks, study.explained)
    if len(lesions) < 2:
        raise NotMeasured("fewer than two patients have an outlined lesion and a class that all networks know")
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    every = list(cases(networks, lesions))
    for i, of_xray in enumerate(tqdm(every, "explainers", unit="X-ray")):
        for kind, case in of_xray.items():
            reference = case.heat(study, DEFAULT)
            other = every[abs(i - 1)][kind]  # of the X-ray before; the first has the second's
            heats = {
                explainer: case.heat(study, explainer)
                for explainer in study.compared or list_explainers()
                if get_explainer(explainer).suits(case.net)
            }
            heat = other.heat(study, DEFAULT)["heat"]
            heats[OTHER] = {"heat": heat} | _kept(study, [*case.key, other.key], partial(case.erased, heat))
            mask = case.mask[0].numpy() > 0
            for explainer, found in heats.items():
                found["enrichment"] = enrichment(found["heat"], mask, case.outline)
                found["agreement"] = agreement(found["heat"], reference["heat"], mask)
                out = values.setdefault((kind, explainer), {})
                for key in found.keys() - {"heat"}:
                    out.setdefault(key, []).append(float(found[key]))
    weights = bootstrap_weights(np.array([lesion.patient for lesion in lesions]))
    models: dict[str, dict] = {
        kind: {"network": name, "explainers": {}} | ({} if of is study else {"weights": of.weights.name})
        for kind, (of, name) in networks.items()
    }
    for (kind, explainer), found in values.items():
        figures = {key: mean(np.array(found[key]), weights) for key in MEASURES}
        if explainer != OTHER:
            figures["seconds"] = float(np.median(found["seconds"]))
        models[kind]["explainers"][explainer] = figures
    threads = f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    device = torch.cuda.get_device_name() if study.device == "cuda" else threads
    return {"n": len(lesions), "device": device, "models": models}


def lines(evidence: dict) -> list[str]:
    """One table: a row for each network and explainer, and one for each kind of network without weights."""
    found, rows = evidence["explainers"], []
    for kind in KINDS:
        if kind not in found["models"]:
            rows.append([f"{kind}: no weights in this manifest", *[""] * (len(MEASURES) + 2)])
            continue
        model = found["models"][kind]
        name = f"`{model['network']}`" + (f", `{model['weights']}`" if "weights" in model else "")
        for explainer, figures in model["explainers"].items():
            title = explainer if explainer == OTHER else get_explainer(explainer).title
            cells = [number(figures[key], 2) for key in MEASURES]
            seconds = f"{figures['seconds']:.1f}" if "seconds" in figures else ""
            rows.append([name, title, *cells, seconds])
    about = f"{found['n']} X-rays, each of another patient; {found['device']}."
    return [TEXT, "", about, "", *table(["network", "explainer", *(f"{m} (95 % CI)" for m in MEASURES), "s"], rows)]
