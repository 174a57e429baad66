"""Figures with intervals: patients drawn with replacement, 2000 times, 2.5th to 97.5th percentile."""

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm, rankdata, t


def bootstrap_weights(patients: np.ndarray, replicates: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each row is drawn when patients are drawn with replacement: (replicates, N) float64."""
    _, number = np.unique(patients, return_inverse=True)
    count = number.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), replicates)
    return drawn[:, number].astype(np.float64)


def row_weights(labels: np.ndarray, sources: np.ndarray, class_weights: str = "natural") -> np.ndarray:
    """How much each X-ray weighs: (N,) float64 of mean 1, so that within a class every source weighs the same.

    Args:
        labels: (N,) class numbers or names.
        sources: (N,) names.
        class_weights: "natural": a class weighs what its share of the X-rays is; "equal": all weigh the same.
    """
    table = pd.DataFrame({"label": labels, "source": sources})
    of_class = table.groupby("label").label.transform("size")
    of_group = table.groupby(["label", "source"]).label.transform("size")
    of_sources = table.groupby("label").source.transform("nunique")
    weight = of_class if class_weights == "natural" else len(table) / table.label.nunique()
    return (weight / (of_sources * of_group)).to_numpy(np.float64)


def interval(value: float, replicates: np.ndarray) -> dict[str, float]:
    """{"value", "low", "high"}: a figure and its 95 % percentile interval."""
    low, high = np.nanpercentile(replicates, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def mean(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """The mean of those `values` (N,) that are finite, with its interval over row weights (R, N); NaN without any."""
    known = np.isfinite(values)
    if not known.any():
        return interval(np.nan, np.zeros(1)) | {"low": np.nan, "high": np.nan}
    means, drawn = group_means(np.where(known, values, 0.0), known[:, None], weights)
    return interval(means[0], drawn)


def proportion(true: np.ndarray, patients: np.ndarray) -> dict[str, float]:
    """Share of rows that are `true` (N,) bool, with its interval.

    Resampling tells nothing where all or none are true; there it is the exact binomial interval over patients.
    """
    true = true.astype(float)
    if 0 < true.mean() < 1:
        return mean(true, bootstrap_weights(patients))
    n = len(np.unique(patients))
    bounds = binomtest(n * int(true[0]), n).proportion_ci()
    return {"value": float(true.mean()), "low": float(bounds.low), "high": float(bounds.high)}


def group_means(values: np.ndarray, members: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `values` (N,) in each of G groups, `members` (N, G) bool: (G,), and resampled with `weights`: (R, G).

    A draw without anyone of a group has no number there.
    """
    inside = members.astype(float)
    drawn = weights @ inside
    with np.errstate(invalid="ignore"):
        return values @ inside / inside.sum(0), weights @ (values[:, None] * inside) / np.where(drawn, drawn, np.nan)


def spread(by_trial: np.ndarray, seed: int = 0) -> np.ndarray:
    """Replicates (R,) of a mean over trials, from those of each trial (T, R), with trials drawn with replacement.

    So few trials, drawn from themselves, vary too little: their deviations are stretched to the width that Student's t
    gives them (the expanded percentile interval of Hesterberg 2015). One trial tells nothing of its spread.
    """
    trials, replicates = by_trial.shape
    mean = by_trial.mean(0)
    if trials == 1:
        return mean
    stretch = t.ppf(0.975, trials - 1) / norm.ppf(0.975) * np.sqrt(trials / (trials - 1))
    drawn = np.random.default_rng(seed).integers(trials, size=(trials, replicates))
    return mean + stretch * (np.take_along_axis(by_trial, drawn, 0).mean(0) - mean)


def mean_over_trials(values: np.ndarray, patients: np.ndarray) -> dict:
    """The mean of `values` (T, N) over trials and X-rays, with their number, "trials".

    The interval resamples patients (N,) and, where there are several, trials.
    """
    weights = bootstrap_weights(patients)
    return interval(values.mean(), spread(values @ weights.T / weights.sum(1))) | {"trials": len(values)}


def auroc(scores: np.ndarray, positive: np.ndarray, patients: np.ndarray, replicates: int = 1000) -> dict:
    """How well `scores` (N,) rank the `positive` (N,) bool above the rest: {"value", "low", "high", "n", "of"}.

    "n" are the positive, "of" all rows.
    """
    order = np.argsort(scores, kind="stable")
    ranks, positive, patients = rankdata(scores[order]), positive[order], patients[order]
    last_of_tie = np.searchsorted(ranks, ranks, "right") - 1
    first_of_tie = np.searchsorted(ranks, ranks, "left")

    def areas(weights: np.ndarray) -> np.ndarray:
        below = np.cumsum(weights * ~positive, 1)
        before = np.concatenate([np.zeros((len(weights), 1)), below], 1)[:, first_of_tie]
        won = ((before + below[:, last_of_tie]) / 2 * weights * positive).sum(1)
        pairs = (weights * positive).sum(1) * below[:, -1]
        return np.where(pairs > 0, won / np.maximum(pairs, 1e-12), np.nan)

    (value,) = areas(np.ones((1, len(ranks))))
    found = interval(value, areas(bootstrap_weights(patients, replicates)))
    return found | {"n": int(positive.sum()), "of": len(ranks)}


def confusions(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """Confusion matrices (R, K, K) of K classes for row weights (R, N), rows the truth."""
    cell = np.eye(classes * classes)[truth * classes + predicted]  # (N, K·K)
    return (weights @ cell).reshape(-1, classes, classes)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Accuracy (...) of confusion matrices (..., K, K), rows the truth."""
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Unweighted mean F1 (...) over those of K classes that somebody has; confusion (..., K, K), rows the truth.

    NaN for a matrix without a class that another one has.
    """
    hit, of_class = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1)
    known = (of_class > 0).reshape(-1, of_class.shape[-1]).any(0)
    f1 = 2 * hit / np.maximum(of_class + confusion.sum(-2), 1e-12)
    return np.where(of_class > 0, f1, np.nan)[..., known].mean(-1)


def even_sample(*kinds: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Positions of at most `n` rows, drawn so that every kind is there about equally often, in random order.

    `kinds` are arrays (N,), the most important first: by class and source, it is even over classes, and within each
    class over its sources, as far as there are enough.
    """
    order = np.random.default_rng(seed).permutation(len(kinds[0]))

    def turns(rows: np.ndarray, kinds: tuple[np.ndarray, ...]) -> list[int]:
        """The rows in an order of which every beginning is even."""
        if not kinds:
            return list(rows)
        first, *rest = kinds
        queues = [turns(rows[first[rows] == kind], tuple(rest)) for kind in np.unique(first[rows])]
        longest = max(map(len, queues), default=0)
        return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]

    drawn = np.array(turns(order, kinds)[:n], np.int64)
    return np.random.default_rng(seed).permutation(drawn)
