"""Refit the last layer of shipped classifiers, so that they carry further: the features know more than it tells.

    python -m train.refit --data DATA

A network learns to call COVID-19 whatever is no child and not of the two hospitals with tuberculosis, because in
training that is enough. On its frozen features the last layer is fitted again so that each class of each source weighs
the same (last-layer retraining, Kirichenko et al. 2023), and each class's logit is then lowered by the margin that
nearly all X-rays of that class have to spare (`calibration.spare_margins`). Where the new layer costs more than a point
of validation accuracy, the margins are taken from the trained one; where those cost as much, or there are none, all
stays as it was.

It writes weights/NAME.last_layer.safetensors beside the trained weights, which do not change, and into the manifest
what was chosen and the temperature that goes with it. `train.evaluate` and `train.evidence` measure the outcome.
"""

import argparse
import json

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from manet_core import CLASSES, list_models
from manet_core.weights import MANIFEST, load_network, read_manifest, sha256

from .calibration import fit_temperature, spare_margins
from .data import LungPictures, Pictures, draw_weights, predicted_lungs
from .evaluate import options

COST = 0.01  # of validation accuracy that a new last layer may cost


def last_layer(net: nn.Module) -> tuple[str, nn.Linear]:
    """The layer that gives the logits, and its name."""
    return [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1]


@torch.inference_mode()
def read_out(net: nn.Module, dataset: LungPictures, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K) and what the last layer sees (N, C), both float32, of a data set in its order."""
    device = next(net.parameters()).device
    logits, seen = [], []
    hook = last_layer(net)[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu().numpy()))
    for image, mask, *_ in tqdm(DataLoader(dataset, 16), name, unit="batch of 16"):
        logits.append(net(image.to(device, memory_format=torch.channels_last), mask.to(device)).float().cpu().numpy())
    hook.remove()
    return np.concatenate(logits), np.concatenate(seen)


def refit(
    features: np.ndarray, labels: np.ndarray, groups: pd.Series, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, C) and bias (K,) of a logistic regression in which every group weighs the same.

    Args:
        features: (N, C) of the X-rays that were trained on.
        labels: (N,) class numbers; each of the K classes is among them.
        groups: (N,) names.
        strength: scikit-learn's C, the inverse of the penalty on the weights of standardised features.
    """
    weights = draw_weights(groups, 1).numpy()
    scale = StandardScaler().fit(features)
    fitted = LogisticRegression(C=strength, max_iter=1000)
    fitted.fit(scale.transform(features), labels, sample_weight=weights / weights.mean())
    weight = fitted.coef_ / scale.scale_
    return weight, fitted.intercept_ - weight @ scale.mean_


def choose(
    trained: np.ndarray, refitted: np.ndarray, labels: np.ndarray, share: float
) -> tuple[str | None, np.ndarray, dict[str, float]]:
    """Which last layer to ship, by its logits (N, K) on validation X-rays.

    Returns:
        "refitted", "trained" (with margins) or None; its margins (K,); the validation accuracy of all three.
    """
    margins = {"refitted": spare_margins(refitted, labels, share), "trained": spare_margins(trained, labels, share)}
    logits = {
        "as trained": trained,
        "refitted": refitted - margins["refitted"],
        "trained": trained - margins["trained"],
    }
    accuracy = {name: float((values.argmax(1) == labels).mean()) for name, values in logits.items()}
    for name in margins:
        if accuracy[name] >= accuracy["as trained"] - COST and (name == "refitted" or margins[name].any()):
            return name, margins[name], accuracy
    return None, np.zeros(trained.shape[1]), accuracy


def refit_network(args: argparse.Namespace, name: str, entry: dict) -> dict:
    """The manifest entry of a network with the last layer that was chosen for it, whose file is written."""
    pictures = Pictures(args.data, entry["preprocessing"]["size"], args.cache)
    rows = pictures.rows("train", "val", labelled=True)
    index, labels = pictures.index.iloc[rows], pictures.labels(rows)
    train = (index.split == "train").to_numpy()
    if missing := [label for k, label in enumerate(CLASSES) if k not in labels[train]]:
        raise SystemExit(f"There is no training X-ray of {', '.join(missing)}: a last layer cannot be fitted.")
    net = load_network(args.weights, name, args.device, refitted=False)
    dataset = LungPictures("classify", pictures, rows, predicted_lungs(pictures, args.weights, rows))
    logits, features = read_out(net, dataset, name)
    groups = (index.label + " of " + index.source)[train]
    layer, trained = last_layer(net)
    weight, bias = refit(features[train].astype(np.float64), labels[train], groups, args.strength)
    refitted = features @ weight.T + bias
    kept, margins, accuracy = choose(logits[~train], refitted[~train], labels[~train], args.share)
    print(
        f"{name}: validation accuracy {accuracy['as trained']:.3f} as trained, with margins {accuracy['refitted']:.3f} "
        f"refitted, {accuracy['trained']:.3f} with its own layer: {kept + ', with margins' if kept else 'as trained'}",
        flush=True,
    )

    entry = {key: value for key, value in entry.items() if key != "last_layer"}
    path = args.weights / f"{name}.last_layer.safetensors"
    if kept is None:
        path.unlink(missing_ok=True)
        entry["temperature"] = fit_temperature(logits[~train], labels[~train])
        return entry
    if kept == "trained":
        weight, bias, refitted = trained.weight.cpu().numpy(), trained.bias.cpu().numpy(), logits
    entry["temperature"] = fit_temperature(refitted[~train] - margins, labels[~train])
    tensors = {"weight": weight, "bias": bias - margins}
    save_file({f"{layer}.{key}": np.ascontiguousarray(t, np.float32) for key, t in tensors.items()}, path)
    entry["last_layer"] = {
        "file": path.name,
        "sha256": sha256(path),
        "kind": kept,
        "strength": args.strength,
        "share": args.share,
        "margins": dict(zip(CLASSES, margins.tolist())),
        "validation_accuracy": accuracy,
    }
    return entry


def main() -> None:
    """Refit them one after another."""
    p = options(__doc__)
    p.add_argument("--models", nargs="+", help="of the manifest; all unless named")
    p.add_argument("--strength", type=float, default=1e-4, help="C of the logistic regression: smaller is stiffer")
    p.add_argument("--share", type=float, default=0.95, help="of a class's X-rays that keep it after the margins")
    args = p.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    entries = read_manifest(args.weights)
    shipped = [name for name in list_models() if name in entries]
    if unknown := set(args.models or []) - set(shipped):
        raise SystemExit(f"There are no weights of {', '.join(sorted(unknown))}; there are: {', '.join(shipped)}.")
    for name in args.models or shipped:
        entries[name] = refit_network(args, name, entries[name])
        (args.weights / MANIFEST).write_text(json.dumps({"models": entries}, indent=2) + "\n")


if __name__ == "__main__":
    main()
