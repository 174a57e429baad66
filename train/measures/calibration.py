"""Do probabilities mean what they say? Temperature scaling (Guo 2017), what it leaves, and operating points."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

from .markdown import table

TITLE = "Calibration"
RIGHT = 0.85  # of the answers at or above a network's operating point, on the validation split


def fit_temperature(
    logits: np.ndarray, target: np.ndarray, exclusive: bool = True, weights: np.ndarray | None = None
) -> float:
    """The T > 0 for which logits / T have the least loss on X-rays that were not trained on.

    Args:
        logits: (N, K).
        target: (N, K), 1 for each class that the label allows, or (N,) class numbers.
        exclusive: −log of the sum of the allowed classes' probabilities; False: binary cross entropy of each class,
            NaN in `target` left out.
        weights: (N,) how much each X-ray weighs where one answer holds; None: all the same.
    """
    if target.ndim == 1:
        target = np.eye(logits.shape[1])[target]
    known, allowed = ~np.isnan(target), np.where(target > 0, 0.0, -np.inf)

    def loss(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        if exclusive:
            losses = logsumexp(scaled, 1) - logsumexp(scaled + allowed, 1)
            return float(np.average(losses, weights=weights))
        return float((np.logaddexp(0, scaled) - target * scaled)[known].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def operating_point(confidence: np.ndarray, right: np.ndarray, share: float = RIGHT) -> float:
    """The lowest probability from which on at least `share` of a network's answers are right; 1 if there is none.

    A network that answers only from there on is a selective classifier (Geifman and El-Yaniv 2017).

    Args:
        confidence: (N,) probabilities of the classes that it named, of X-rays that were not trained on.
        right: (N,) bool.
        share: of the answers.
    """
    order = np.argsort(-confidence, kind="stable")
    confidence, share_right = confidence[order], right[order].cumsum() / np.arange(1, len(order) + 1)
    last_of_equals = np.append(confidence[1:] < confidence[:-1], True)
    enough = np.flatnonzero(last_of_equals & (share_right >= share))
    return float(confidence[enough[-1]]) if len(enough) else 1.0


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


def multi_label_error(probabilities: np.ndarray, target: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over all cells of (N, K) that `target` knows, each a yes-or-no question."""
    known = ~np.isnan(target)
    p, truth = probabilities[known], target[known].astype(int)
    return expected_calibration_error(np.stack([1 - p, p], 1), truth, bins)


def measure(study, name: str) -> dict:
    """Temperature and operating point that the validation split gives, and the errors on test and external X-rays."""
    readings = study.read(name)
    found = {"temperature": readings.temperature, "operating_point": readings.operating_point}
    for split in ("test", "external"):
        if not readings.task.exclusive:
            rows = readings.known(split)
            if rows.any():
                error = multi_label_error(readings.probabilities[rows], readings.target[rows])
                found[split] = {"n": int(rows.sum()), "ece": error}
            continue
        rows = readings.split(split) & readings.labelled
        if rows.any():
            found[split] = calibration(readings.logits[rows], readings.truth[rows], readings.temperature)
    return {"calibration": found}


def lines(evidence: dict) -> list[str]:
    """ECE and Brier score, before and after the temperature."""
    models = {name: m["calibration"] for name, m in evidence["models"].items() if "calibration" in m}
    rows, findings = [], []
    for name, c in models.items():
        for where in ("test", "external"):
            if "before" in c.get(where, {}):
                figures = [c[where][when][what] for what in ("ece", "brier") for when in ("before", "after")]
                cells = [f"{figure:.3f}" for figure in figures]
                chance = "{mean:.3f} (up to {high:.3f})".format(**c[where]["by_chance"])
                rows.append(
                    [f"`{name}`", where, c[where]["n"], f"{c['temperature']:.2f}", *cells[:2], chance, *cells[2:]]
                )
            elif where in c:
                findings.append(
                    [f"`{name}`", where, c[where]["n"], f"{c['temperature']:.2f}", f"{c[where]['ece']:.3f}"]
                )
    head = ["", "X-rays", "n", "temperature (from val)"]
    more = ["ECE before", "after", "of a perfect network", "Brier before", "after"]
    out = ["![Reliability of each network on the test split](reliability.png)", "", *table([*head, *more], rows)]
    return out + (table([*head, "ECE over all findings"], findings) if findings else [])


def draw(models: dict[str, dict], path: Path) -> None:
    """How often each network is right at each confidence, before and after its temperature, on the test split.

    Args:
        models: {name: what `measure` returns as "calibration"}.
        path: of the picture.
    """
    drawn = {name: found for name, found in models.items() if "before" in found.get("test", {})}
    columns = max(1, min(3, len(drawn)))
    figure = Figure(figsize=(3.6 * columns, 3.6 * max(1, -(-len(drawn) // columns))), layout="constrained")
    grid = figure.subplots(max(1, -(-len(drawn) // columns)), columns, squeeze=False)
    for axes, (name, found) in zip(grid.flat, drawn.items()):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        for when, style, colour in (("before", "o--", "#E69F00"), ("after", "s-", "#0072B2")):
            bins = found["test"][when]["reliability"]
            label = f"{when}: ECE {found['test'][when]['ece']:.3f}"
            axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], style, color=colour,
                      markersize=4, label=label)  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="probability given", ylabel="accuracy")
        axes.set_title(f"{name}, n = {found['test']['n']}", fontsize=9)
        axes.legend(fontsize=8, loc="upper left")
    for axes in grid.flat[len(drawn) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=100)
