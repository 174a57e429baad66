"""Last layers that were fitted again after training (`train.refit`), beside those with which networks were trained."""

from dataclasses import replace

import torch

from manet_core.weights import load_network

from .classification import read_rows
from .external import external
from .markdown import compared
from .study import Study, last_layer

TITLE = "The last layer"
TEXT = """\
As trained, and as shipped: the same weights, but the last layer fitted again on the frozen features with sources
weighing alike, and each class's logit lowered by the margin that nearly all of the class's own validation X-rays have
to spare over every other class (`python -m train.refit`). No external X-ray was fitted to or chose between these; but
what was tried at all, and how strongly, is due to what they had shown, so expect a little less of others."""


def measure(study: Study, name: str) -> dict:
    """What was refitted, and the figures of the network as it was trained."""
    readings = study.read(name)
    if not readings.task.exclusive:
        return {}
    _, layer = last_layer(load_network(study.weights, name, refitted=False))
    with torch.inference_mode():
        trained = replace(readings, logits=layer(torch.from_numpy(readings.features)).numpy())
    test = readings.split("test") & readings.labelled
    return {
        "last_layer": study.entries[name].get("last_layer"),
        "as_trained": read_rows(trained, test) | {"external": external(trained)},
    }


def lines(evidence: dict) -> list[str]:
    """Both layers of each network; nothing if none was refitted."""
    models = {name: m for name, m in evidence["models"].items() if "as_trained" in m and "external" in m}
    if not any(m["last_layer"] for m in models.values()):
        return []
    runs = []
    for name, m in models.items():
        layer, before = m["last_layer"], m["as_trained"]
        runs.append(("as trained" if layer else "as trained, and as shipped", name, before, before["external"]))
        if layer:
            margins = ", ".join(f"{label} {margin:.1f}" for label, margin in layer["margins"].items() if margin)
            kind = {"refitted": "refitted", "trained": "as trained"}[layer["kind"]]
            runs.append((f"**as shipped**: {kind}, margins {margins or 'none'}", name, m["test"], m["external"]))
    return [TEXT, "", *compared("last layer", runs)]
