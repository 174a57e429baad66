"""Heatmaps in numbers: where they lie, whether those places matter, and whether they depend on what was learnt."""

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from manet_core.explain.gradcam import grad_cam, scale_maps

from .data import LungPictures


def heatmap(net: nn.Module, image: torch.Tensor, mask: torch.Tensor, label: int) -> np.ndarray:
    """Grad-CAM of class `label` for one item (1, S, S) of a data set: (S, S) float32 in [0, 1]."""
    device = next(net.parameters()).device
    with torch.inference_mode():
        features = net.forward_features(image[None].to(device), mask[None].to(device))
    _, maps = grad_cam(net, features)
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


def measure(nets: dict[str, nn.Module], randomised: dict[str, nn.Module], dataset: LungPictures,
            items: np.ndarray) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """Per network and measure one value an item (N,), so that networks can be compared in pairs.

    "deletion" and "insertion" are gains over the heatmap of another X-ray of the same network: above zero, the
    network's own heatmap shows better than a stranger's what it needs. "as random" is the correlation with the
    heatmap of the same architecture with random weights (Adebayo 2018): near zero where the heatmap depends on
    what was learnt.
    """
    out = {name: {k: [] for k in ("in lung", "spread", "deletion", "insertion", "as random")} for name in nets}
    between = {f"{a} ~ {b}": [] for i, a in enumerate(nets) for b in list(nets)[i + 1 :]}
    strangers: dict[str, np.ndarray] = {}
    for item in tqdm([items[-1], *items], "heatmaps", unit="X-ray"):
        image, mask, label = dataset[item]
        heats = {name: heatmap(net, image, mask, label) for name, net in nets.items()}
        if strangers:
            for name, net in nets.items():
                own, other = (erasure(net, image, mask, label, h) for h in (heats[name], strangers[name]))
                values = out[name]
                values["in lung"].append(in_lung(heats[name], mask[0].numpy()))
                values["spread"].append(spread(heats[name]))
                values["deletion"].append(other[0] - own[0])
                values["insertion"].append(own[1] - other[1])
                values["as random"].append(correlation(heats[name], heatmap(randomised[name], image, mask, label)))
            for pair, values in between.items():
                a, b = pair.split(" ~ ")
                values.append(correlation(heats[a], heats[b]))
        strangers = heats
    per_net = {name: {k: np.array(v) for k, v in values.items()} for name, values in out.items()}
    return per_net | {"agreement": {pair: np.array(v) for pair, v in between.items()}}
