"""Do probabilities mean what they say? Temperature scaling and the errors that it mends (Guo 2017)."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 for which softmax(logits / T) has the least cross entropy; logits (N, K), labels (N,)."""

    def loss(log_t: float) -> float:
        return -log_softmax(logits / np.exp(log_t), 1)[np.arange(len(labels)), labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def spare_margins(logits: np.ndarray, labels: np.ndarray, share: float = 0.95) -> np.ndarray:
    """How far above all other logits that of its own class lies in `share` of the X-rays of each class: (K,), ≥ 0.

    A class that nothing else in the training data resembles is told from the others with much to spare, and what is new
    and leans its way goes with it. Logits minus these margins ask each class to be about as clear as on its own
    X-rays, in the spirit of conformal prediction by class (Vovk 2012).

    Args:
        logits: (N, K), of X-rays that were not trained on.
        labels: (N,) class numbers; the margin of a class that is not among them is 0.
    """
    margins = np.zeros(logits.shape[1])
    for k in np.unique(labels):
        own = logits[labels == k]
        spare = own[:, k] - np.delete(own, k, 1).max(1)
        margins[k] = max(0, np.quantile(spare, 1 - share))
    return margins


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[dict]:
    """Per bin of the highest probability, over equal widths: {"confidence", "accuracy", "n"}; empty bins are left out.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) class numbers.
    """
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {"confidence": float(confidence[at].mean()), "accuracy": float(hit[at].mean()), "n": int(at.sum())}
        for at in (which == b for b in range(bins))
        if at.any()
    ]


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over the bins of `reliability`, weighted by their n."""
    rows = reliability(probabilities, labels, bins)
    return sum(r["n"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / len(labels)


def error_by_chance(probabilities: np.ndarray, bins: int = 15, replicates: int = 500) -> dict[str, float]:
    """The ECE that a perfectly calibrated network of these probabilities (N, K) would show on N X-rays.

    It is not zero, as a bin's accuracy is measured on few: {"mean", "high"}, the latter the 97.5th percentile.
    """
    confidence = probabilities.max(1)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    hits = np.random.default_rng(0).random((replicates, len(confidence))) < confidence
    gaps = (hits - confidence) @ np.eye(bins)[which]  # (replicates, bins), each bin's gap times its n
    errors = np.abs(gaps).sum(1) / len(confidence)
    return {"mean": float(errors.mean()), "high": float(np.percentile(errors, 97.5))}


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of the probabilities (N, K) from the truth, summed over classes: 0 to 2."""
    return float(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1).mean())


def calibration(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict:
    """ECE, Brier score and reliability at T = 1 and at `temperature`; and what ECE chance alone makes there."""
    out = {"n": len(labels), "by_chance": error_by_chance(softmax(logits / temperature, 1))}
    for name, t in (("before", 1.0), ("after", temperature)):
        p = softmax(logits / t, 1)
        out[name] = {
            "ece": expected_calibration_error(p, labels),
            "brier": brier(p, labels),
            "reliability": reliability(p, labels),
        }
    return out
