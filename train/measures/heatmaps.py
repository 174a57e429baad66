"""Heatmaps in numbers: where they lie, whether those places matter, and whether they depend on what was learnt."""

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from manet_core import create_classifier
from manet_core.explain import DEFAULT, get_explainer
from manet_core.explain.gradcam import scale_maps
from manet_core.networks.registry import split_name
from manet_core.tasks import get_task

from ..data import LungPictures
from .markdown import code, number, table
from .statistics import bootstrap_weights, even_sample, mean
from .study import SPLITS, NotMeasured, Study

TITLE = "Heatmaps"
MEASURES = ("in lung", "spread", "deletion", "insertion", "as random")
TEXT = """\
In lung: share of the heatmap inside the mask; mask attention silences features outside, so a higher share would say
nothing of its reasoning. Spread: entropy, 1 for an even map. Deletion and insertion: what the network's own heatmap
gains over that of another X-ray when lung tissue is covered, or uncovered, hottest first; above 0, it points at what
the network uses. As random: correlation with the heatmap of the same architecture with random weights."""


def heatmap(net: nn.Module, image: torch.Tensor, mask: torch.Tensor, label: int) -> np.ndarray:
    """Grad-CAM of class `label` for one item (1, S, S) of a data set: (S, S) float32 in [0, 1]."""
    device = next(net.parameters()).device
    image, mask = image[None].to(device), mask[None].to(device)
    with torch.inference_mode():
        features = net.forward_features(image, mask)
    _, maps = get_explainer(DEFAULT).function(net, image, mask, features)
    return scale_maps(maps, image.shape[-1])[label]


def in_lung(heat: np.ndarray, mask: np.ndarray) -> float:
    """Share of a heatmap's mass inside the mask, both (S, S); 0 for an empty heatmap."""
    return float(heat[mask > 0].sum() / max(heat.sum(), 1e-7))


def spread(heat: np.ndarray) -> float:
    """Entropy of a heatmap as a distribution over pixels, over that of an even one: 0 a single point, 1 even."""
    p = heat.ravel() / max(heat.sum(), 1e-7)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(heat.size))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two heatmaps; NaN if one is even."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")


@torch.inference_mode()
def erasure(net: nn.Module, image: torch.Tensor, mask: torch.Tensor, label: int, heat: np.ndarray,
            steps: int = 10) -> tuple[float, float]:  # fmt: skip
    """Deletion and insertion within the lungs (Petsiuk 2018): mean probability of `label` on the way.

    Lung pixels are painted with the lungs' mean grey, hottest first (deletion), or uncovered from it, hottest first
    (insertion). The mask stays as it is, so that only what the network sees inside the lungs changes. A heatmap that
    shows what matters has a low deletion and a high insertion value.
    """
    device = next(net.parameters()).device
    places = np.flatnonzero(mask[0].numpy() > 0)
    if len(places) < steps:
        return float("nan"), float("nan")
    order = places[np.argsort(-heat.ravel()[places], kind="stable")]
    full = image.flatten()
    grey = full[torch.from_numpy(places)].mean()
    stack = []
    for start in (full, torch.where(torch.zeros_like(full, dtype=bool).index_fill(0, torch.from_numpy(places), True),
                                    grey, full)):  # fmt: skip
        for step in range(steps + 1):
            part = torch.from_numpy(order[: round(len(order) * step / steps)])
            changed = start.clone()
            changed[part] = grey if start is full else full[part]
            stack.append(changed.view_as(image))
    batch = torch.stack(stack).to(device)
    probabilities = net(batch, mask[None].expand(len(batch), -1, -1, -1).to(device)).softmax(1)[:, label].cpu().numpy()
    return float(probabilities[: steps + 1].mean()), float(probabilities[steps + 1 :].mean())


def compare(
    nets: dict[str, nn.Module],
    randomised: dict[str, nn.Module],
    datasets: dict[str, LungPictures],
    labels: np.ndarray,
) -> dict[str, dict[str, np.ndarray]]:
    """Per network and measure one value an item (N,), so that networks can be compared in pairs.

    "deletion" and "insertion" are gains over the heatmap of another X-ray by the same network: above zero, the
    network's own heatmap shows better than another's what it needs. "as random" is the correlation with the
    heatmap of the same architecture with random weights (Adebayo 2018): near zero where the heatmap depends on
    what was learnt.

    Args:
        datasets: what each network is shown of the same items.
        labels: class numbers (N,).

    Returns:
        {network: {measure: (N,)}, "agreement": {"a ~ b": (N,)}}, the latter for networks that are shown the same.
    """
    out = {name: {k: [] for k in MEASURES} for name in nets}
    alike = [(a, b) for i, a in enumerate(nets) for b in list(nets)[i + 1 :] if datasets[a].view == datasets[b].view]
    between: dict[str, list] = {f"{a} ~ {b}": [] for a, b in alike}
    others: dict[str, np.ndarray] = {}
    for item in tqdm([len(labels) - 1, *range(len(labels))], "heatmaps", unit="X-ray"):
        label, heats = labels[item], {}
        for name, net in nets.items():
            image, mask, _ = datasets[name][item]
            heats[name] = heatmap(net, image, mask, label)
            if others:
                own, other = (erasure(net, image, mask, label, h) for h in (heats[name], others[name]))
                values = out[name]
                values["in lung"].append(in_lung(heats[name], mask[0].numpy()))
                values["spread"].append(spread(heats[name]))
                values["deletion"].append(other[0] - own[0])
                values["insertion"].append(own[1] - other[1])
                values["as random"].append(correlation(heats[name], heatmap(randomised[name], image, mask, label)))
        if others:
            for a, b in alike:
                between[f"{a} ~ {b}"].append(correlation(heats[a], heats[b]))
        others = heats
    per_net = {name: {k: np.array(v) for k, v in values.items()} for name, values in out.items()}
    return per_net | {"agreement": {pair: np.array(v) for pair, v in between.items()}}


def measure(study: Study) -> dict:
    """{task: {"n", "models", "agreement"}}: `compare` on a sample of the test split, even over classes and sources."""
    out = {}
    for task, names in study.tasks.items():
        readings = study.read(names[0])
        at = np.flatnonzero(readings.split("test") & readings.labelled)
        if not len(at):
            continue
        source = readings.index.source.to_numpy()
        at = at[even_sample(readings.truth[at], source[at], n=study.heatmaps)]
        rows = study.pictures().rows(*SPLITS)[at]
        nets = {name: study.network(name) for name in names}
        torch.manual_seed(0)
        classes = len(get_task(task).classes)
        randomised = {name: create_classifier(name, num_classes=classes).eval().to(study.device) for name in names}
        datasets = {name: study.dataset(study.entries[name], rows) for name in names}
        measured = compare(nets, randomised, datasets, readings.truth[at])
        weights = bootstrap_weights(readings.patients[at])
        found = {"agreement": {pair: mean(v, weights) for pair, v in measured.pop("agreement").items()}, "models": {}}
        for name, values in measured.items():
            found["models"][name] = {what: mean(v, weights) for what, v in values.items()}
            plain = split_name(name)[0]
            if name != plain and plain in measured:
                gaps = {what: mean(v - measured[plain][what], weights) for what, v in values.items()}
                found["models"][name]["minus plain"] = gaps
        groups = set(zip(readings.truth[at], source[at]))
        out[task] = {"n": len(at), "patients": len(set(readings.patients[at])), "groups": len(groups)} | found
    if not out:
        raise NotMeasured("no test X-ray has a label of one class")
    return out


def lines(evidence: dict) -> list[str]:
    """Measures of each network, and how alike their heatmaps are."""
    out = []
    for task, found in evidence["heatmaps"].items():
        even = f", even over {found['groups']} groups of class and source" if "groups" in found else ""
        what = f"{get_task(task).title}: {found['n']} test X-rays{even}; the true class."
        rows = []
        for name, m in found["models"].items():
            rows.append([f"`{name}`", *(number(m[measure]) for measure in MEASURES)])
            if "minus plain" in m:
                rows.append([f"`{name}` − plain", *(number(m["minus plain"][measure]) for measure in MEASURES)])
        out += [what, "", *table(["", *MEASURES], rows), TEXT, ""]
        pairs = {tuple(pair.split(" ~ ")): f"{figure['value']:.2f}" for pair, figure in found["agreement"].items()}
        if pairs:
            out += ["Agreement: correlation of two networks' heatmaps of the same X-ray.", ""]
            names = list(found["models"])
            rows = [[f"`{a}`", *(pairs.get((a, b)) or pairs.get((b, a), "") for b in names)] for a in names]
            out += table(["", *code(names)], rows)
    return out
