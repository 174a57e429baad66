"""Findings learnt beside the classes, as further outputs that are dropped when the weights are kept.

Of the draws of `train.classify --findings 0.35` that share are X-rays whose findings are known (task `nih14`), those of
the `pretrain` split included. Their source is one more hospital, with healthy people and many diseases, which
the classes alone do not show: features that must also tell its findings can rely less on what tells the sources of the
classes apart. The network that is validated and kept has the outputs of its task alone.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manet_core.tasks import NIH14

from .data import LungPictures, lungs_for, of_sources
from .measures.study import last_layer
from .recipe import Recipe, Run

FURTHER = "further."  # in the names of the weights that are not kept
_WEIGHT = 4.0  # of the findings' loss, the mean over 14 of them, most of them absent; chosen, not tuned
_HEALTHY = 0.3  # how often an X-ray without a finding is drawn, for each one with findings


class FurtherOutputs(nn.Linear):
    """The last layer of a classifier; while it trains, with the logits of the 14 findings behind its own.

    (B, C) → (B, K), or (B, K + 14) in training mode. Its own weights keep their names.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.further = nn.Linear(layer.in_features, len(NIH14.classes))
        self.train(layer.training)

    def forward(self, features: Tensor) -> Tensor:
        own = super().forward(features)
        return torch.cat([own, self.further(features)], 1) if self.training else own


def add_outputs(net: nn.Module, start: dict[str, Tensor] | None = None) -> None:
    """Put `FurtherOutputs` in the place of the last layer of a classifier.

    Args:
        net: changed here.
        start: weights of the same backbone. Where its last layer is one for findings, the further outputs start as it.
    """
    name, layer = last_layer(net)
    outputs = FurtherOutputs(layer)
    known = {part: (start or {}).get(f"{name}.{part}") for part in ("weight", "bias")}
    if all(w is not None and len(w) == len(NIH14.classes) for w in known.values()):
        outputs.further.load_state_dict(known)
    net.set_submodule(name, outputs)


def kept(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the weights of a network, those that are kept."""
    return {name: weight for name, weight in state.items() if FURTHER not in name}


def add_pictures(train_set: LungPictures, recipe: Recipe, run: Run, draw: Tensor | None) -> tuple[LungPictures, Tensor]:
    """The training X-rays and those with known findings, and how often to draw each.

    Args:
        train_set: of the classes alone.
        draw: (N,) weights of its items; None: all alike.

    Returns:
        The set of N + M items, targets (N + M, K + 14): NaN for findings that are not asked, 0 for the classes of an
        X-ray that is there for its findings; and weights (N + M,), of which the M share `recipe.findings`. An X-ray
        whose class and findings are known is there twice.

    Raises:
        SystemExit: the index knows no findings.
    """
    pictures = train_set.pictures
    rows = pictures.rows(*NIH14.splits, task=NIH14)
    rows = rows[of_sources(pictures.index, recipe.sources)[rows]]
    if not len(rows):
        raise SystemExit("--findings needs training X-rays with findings in the index, and there are none.")
    targets = pictures.targets(rows, NIH14)
    both = np.concatenate([train_set.rows, rows])
    lungs = lungs_for(recipe.model, recipe.sees, pictures, run.weights, both)
    same = {name: getattr(train_set, name) for name in ("task", "pictures", "augment", "seed", "sees", "view")}
    joined = LungPictures(rows=both, lungs=lungs, **same)
    n, classes = train_set.targets.shape
    of_classes = np.concatenate([train_set.targets, np.zeros((len(rows), classes), np.float32)])
    of_findings = np.concatenate([np.full((n, len(NIH14.classes)), np.nan, np.float32), targets])
    joined.targets = np.concatenate([of_classes, of_findings], 1)
    own = torch.ones(n) if draw is None else draw
    further = torch.from_numpy(np.where(targets.any(1), 1.0, _HEALTHY)).float()
    share = recipe.findings
    return joined, torch.cat([(1 - share) * own / own.sum(), share * further / further.sum()])


def joint_loss(logits: Tensor, target: Tensor, class_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean loss of a batch: of the classes where a class is known, of the findings elsewhere.

    Args:
        logits, target: (B, K + 14), the target as `add_pictures` makes it.
        class_loss: (logits (b, K), target (b, K)) -> scalar.
    """
    k = target.shape[1] - len(NIH14.classes)
    asked = target[:, k:].isnan().any(1)  # for its class
    share, total = asked.float().mean(), logits.new_zeros(())
    if asked.any():
        total = total + share * class_loss(logits[asked, :k], target[asked, :k])
    if not asked.all():
        found = F.binary_cross_entropy_with_logits(logits[~asked, k:].float(), target[~asked, k:])
        total = total + (1 - share) * _WEIGHT * found
    return total
