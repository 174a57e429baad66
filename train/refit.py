"""Fit the last layer of shipped classifiers again, so that they hold up better on other hospitals' X-rays.

    python -m train.refit --data DATA

A network learns to label unfamiliar adults COVID-19, because in training nearly all adults from elsewhere have it. On
its frozen features the last layer is fitted again so that within each class every source weighs the same (last-layer
retraining, Kirichenko et al. 2023), and each class's logit is then lowered by the margin that nearly all X-rays of that
class have to spare (`measures.calibration`). How much a class weighs is a choice: `--class-weights natural` keeps
its share of the training X-rays, `equal` gives all classes the same.

Where the new layer would cost any class more than `--cost` points of its sensitivity on validation, the margins are
taken from the trained one; where those cost as much, or there are none, all stays as it was.

It writes weights/NAME.last_layer.safetensors beside the trained weights, which do not change, and into the manifest
what was chosen, and the temperature and operating point that go with it. `train.evaluate` and `train.evidence` measure
the outcome.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from manet_core import list_models
from manet_core.preprocess import View
from manet_core.tasks import get_task
from manet_core.weights import load_network, manifest_path, read_manifest, sha256, write_manifest

from . import run_verb
from .data import LungPictures, Pictures, predicted_lungs
from .measures.calibration import fit_temperature, operating_point, spare_margins
from .measures.statistics import row_weights
from .measures.study import last_layer, options, read_out

CLASS_WEIGHTS = ("natural", "equal")


def refit(
    features: np.ndarray, labels: np.ndarray, sources: np.ndarray, strength: float, class_weights: str = "natural"
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, C) and bias (K,) of a logistic regression in which every source of a class weighs the same.

    Args:
        features: (N, C) of the X-rays that were trained on.
        labels: (N,) class numbers; each of the K classes is among them.
        sources: (N,) names.
        strength: scikit-learn's C, the inverse of the penalty on the weights of standardised features.
        class_weights: as in `row_weights`.
    """
    scale = StandardScaler().fit(features)
    fitted = LogisticRegression(C=strength, max_iter=1000)
    fitted.fit(scale.transform(features), labels, sample_weight=row_weights(labels, sources, class_weights))
    weight = fitted.coef_ / scale.scale_
    return weight, fitted.intercept_ - weight @ scale.mean_


def sensitivities(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sensitivity (K,) of each class, NaN for a class without an X-ray; logits (N, K), labels (N,)."""
    hit = logits.argmax(1) == labels
    return np.array([hit[labels == k].mean() if (labels == k).any() else np.nan for k in range(logits.shape[1])])


def choose(
    trained: np.ndarray, refitted: np.ndarray, labels: np.ndarray, quantile: float, cost: float
) -> tuple[str | None, np.ndarray, dict[str, np.ndarray]]:
    """Which last layer to ship, by its logits (N, K) on validation X-rays.

    Args:
        trained: of the layer as it was trained.
        refitted: of the new one.
        labels: (N,) class numbers.
        quantile: of a class's X-rays that keep their class after its margin is taken.
        cost: points of sensitivity, of 100, that no class may lose more than.

    Returns:
        "refitted", "trained" (with margins) or None; its margins (K,); each class's sensitivity (K,) of all three.
    """
    margins = {name: spare_margins(v, labels, quantile) for name, v in (("refitted", refitted), ("trained", trained))}
    logits = {
        "as trained": trained,
        "refitted": refitted - margins["refitted"],
        "trained": trained - margins["trained"],
    }
    found = {name: sensitivities(values, labels) for name, values in logits.items()}
    for name in margins:
        loss = np.nanmax(found["as trained"] - found[name])
        if 100 * loss <= cost + 1e-9 and (name == "refitted" or margins[name].any()):
            return name, margins[name], found
    return None, np.zeros(trained.shape[1]), found


def calibrated(logits: np.ndarray, labels: np.ndarray, sources: np.ndarray) -> dict[str, float]:
    """{"temperature", "operating_point"} of a layer's logits (N, K) on validation X-rays, with their class numbers (N,)
    and the names of their sources (N,).
    """
    temperature = fit_temperature(logits, labels, weights=row_weights(labels, sources))
    confidence = softmax(logits / temperature, 1).max(1)
    return {"temperature": temperature, "operating_point": operating_point(confidence, logits.argmax(1) == labels)}


def refit_network(args: argparse.Namespace, name: str, entry: dict) -> dict:
    """The manifest entry of a network with the last layer that was chosen for it, whose file is written."""
    task, view = get_task(entry["task"]), View.of(entry["preprocessing"])
    pictures = Pictures(args.data, view.working, args.cache)
    rows = pictures.rows("train", "val", task=task)
    targets = pictures.targets(rows, task)
    rows, labels = rows[targets.sum(1) == 1], targets[targets.sum(1) == 1].argmax(1)  # of one certain class
    index = pictures.index.iloc[rows]
    train, sources = (index.split == "train").to_numpy(), index.source.to_numpy()
    if missing := [label for k, label in enumerate(task.classes) if k not in labels[train]]:
        raise SystemExit(f"There is no training X-ray of {', '.join(missing)}: a last layer cannot be fitted.")
    net = load_network(args.weights, name, args.device, refitted=False)
    lungs = predicted_lungs(pictures, args.weights, rows)
    dataset = LungPictures("classify", pictures, rows, lungs, asked=task, view=view)
    logits, features = read_out(net, dataset, name)
    layer, trained = last_layer(net)
    of_train = features[train].astype(np.float64), labels[train], sources[train]
    weight, bias = refit(*of_train, args.strength, args.class_weights)
    refitted = features @ weight.T + bias
    kept, margins, found = choose(logits[~train], refitted[~train], labels[~train], args.share, args.cost)
    print(f"{name}: sensitivity on validation, % of {', '.join(task.classes)}")
    for which, said in (
        ("as trained", "as trained"),
        ("refitted", "refitted, with margins"),
        ("trained", "as trained, with margins"),
    ):
        figures = ", ".join(f"{100 * value:.1f}" for value in found[which])
        print(f"  {said}: {figures}{' (kept)' if which == (kept or 'as trained') else ''}", flush=True)

    entry = {key: value for key, value in entry.items() if key != "last_layer"}
    path = manifest_path(args.weights).with_name(f"{Path(entry['file']).stem}.last_layer.safetensors")
    if kept is None:
        path.unlink(missing_ok=True)
        return entry | calibrated(logits[~train], labels[~train], sources[~train])
    if kept == "trained":
        weight, bias, refitted = trained.weight.cpu().numpy(), trained.bias.cpu().numpy(), logits
    entry |= calibrated(refitted[~train] - margins, labels[~train], sources[~train])
    tensors = {"weight": weight, "bias": bias - margins}
    save_file({f"{layer}.{key}": np.ascontiguousarray(t, np.float32) for key, t in tensors.items()}, path)
    entry["last_layer"] = {
        "file": path.name,
        "sha256": sha256(path),
        "kind": kept,
        "strength": args.strength,
        "share": args.share,
        "class_weights": args.class_weights,
        "margins": dict(zip(task.classes, margins.tolist())),
        "validation_sensitivity": {
            which: {label: value for label, value in zip(task.classes, values.tolist()) if np.isfinite(value)}
            for which, values in found.items()
        },
    }
    return entry


def main() -> None:
    """Refit them one after another."""
    p = options(__doc__)
    p.add_argument("--models", nargs="+", help="of the manifest; all unless named")
    p.add_argument("--strength", type=float, default=1e-4, help="C of the logistic regression: smaller is stiffer")
    p.add_argument("--share", type=float, default=0.95, help="of a class's X-rays that keep it after the margins")
    p.add_argument(
        "--class-weights",
        choices=CLASS_WEIGHTS,
        default="natural",
        help="natural: a class weighs as much as there are X-rays of it; equal: all weigh the same",
    )
    p.add_argument(
        "--cost", type=float, default=5.0, help="points of its sensitivity on validation that any class may lose"
    )
    args = p.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    entries = read_manifest(args.weights)
    shipped = [name for name in list_models() if name in entries and get_task(entries[name]["task"]).exclusive]
    if unknown := set(args.models or []) - set(shipped):
        raise SystemExit(
            f"No last layer can be fitted for {', '.join(sorted(unknown))}; there are: {', '.join(shipped)}."
        )
    for name in args.models or shipped:
        entries[name] = refit_network(args, name, entries[name])
        write_manifest(args.weights, entries)


if __name__ == "__main__":
    run_verb(main)
