"""What a report computes from predictions: intervals, confusion, calibration, thresholds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, special, stats

_DRAWS = 4000
_BINS = 10


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities ``[n, C]``; rows with a logit that is not finite are all zero."""
    finite = np.isfinite(logits).all(-1, keepdims=True)
    safe = np.where(finite, logits, 0.0)
    exp = np.exp(safe - safe.max(-1, keepdims=True))
    return np.where(finite, exp / exp.sum(-1, keepdims=True), 0.0)


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns counts ``[C, C + 1]`` of true and predicted classes; the last column is no answer."""
    classes = logits.shape[-1]
    found = np.asarray(np.isfinite(logits).all(axis=-1))
    predicted = np.where(found, np.where(found[:, None], logits, 0).argmax(-1), classes)
    counts = np.zeros((classes, classes + 1), int)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def recalls(counts: np.ndarray) -> np.ndarray:
    """Returns the recall ``[C]`` of each class from counts; NaN for classes without examples."""
    total = counts.sum(1)
    return np.divide(
        np.diagonal(counts), total, out=np.full(len(total), np.nan), where=total > 0, dtype=float
    )


def balanced_accuracy(counts: np.ndarray) -> float:
    """Returns the mean recall over the classes that have examples; NaN without examples."""
    found = recalls(counts)
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def interval(logits: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Returns a 95 % interval of balanced accuracy, over the examples of a client.

    It says how much the value depends on which patients happened to be in the test split. It does
    not include the randomness of training. The recall of each class gets the posterior of a
    binomial share with Jeffreys' prior, ``Beta(hits + 1/2, misses + 1/2)``. A bootstrap would claim
    to be certain wherever the few examples of a class are all right, or all wrong.

    Args:
      logits: ``[n, C]``.
      labels: ``[n]``.
      seed: Seed of the draws.

    Returns:
      The 2.5th and 97.5th percentile over 4,000 draws, moved to hold the value itself; NaN without
      examples.
    """
    counts = confusion(logits, labels)
    value = balanced_accuracy(counts)
    if np.isnan(value):
        return value, value
    hits, total = np.diagonal(counts), counts.sum(1)
    hits, total = hits[total > 0], total[total > 0]
    rng = np.random.default_rng(seed)
    drawn = rng.beta(hits + 0.5, total - hits + 0.5, (_DRAWS, len(total))).mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return min(float(low), value), max(float(high), value)


def interval_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Returns Student's 95 % interval of a mean of shares, such as the Dice of examples.

    Args:
      values: ``[n]`` from 0 to 1; NaN is left out.

    Returns:
      Its bounds, within 0 and 1; NaN for fewer than two values.
    """
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def reliability(
    logits: np.ndarray, labels: np.ndarray, bins: int = _BINS
) -> list[tuple[float, float, int]]:
    """Returns (mean confidence, accuracy, examples) of each bin that is not empty."""
    probs = softmax(logits)
    confidence, right = probs.max(-1), probs.argmax(-1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [
        (float(confidence[place == i].mean()), float(right[place == i].mean()), int(n))
        for i, n in enumerate(np.bincount(place, minlength=bins))
        if n
    ]


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the expected calibration error in 15 bins, as runs measure it; NaN if empty."""
    found = reliability(logits, labels, bins=15)
    total = sum(n for *_, n in found)
    off = sum(n * abs(confidence - right) for confidence, right, n in found)
    return off / total if total else float("nan")


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature T at which logits / T fit labels best.

    It minimises the sum of the cross-entropies plus ``(log T)^2 / 2``, a standard normal prior that
    keeps T near 1 where there are few examples. Without the prior it is the temperature scaling of
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
      logits: ``[n, C]``; examples with a logit that is not finite are left out.
      labels: ``[n]``.
    """
    finite = np.isfinite(logits).all(axis=-1)
    logits, labels = logits[finite].astype(float), labels[finite]
    rows = np.arange(len(labels))

    def cost(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        entropy = special.logsumexp(scaled, axis=-1) - scaled[rows, labels]
        return float(entropy.sum()) + log_t**2 / 2

    found: Any = optimize.minimize_scalar(cost, bounds=(-5, 5), method="bounded")
    return float(np.exp(found.x))


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the threshold with the best balanced accuracy, for two classes.

    Args:
      scores: ``[n]`` probabilities of class 1.
      labels: ``[n]``, 0 or 1.

    Returns:
      The middle between two neighbouring scores; of equally good ones the nearest to 0.5. It is 0.5
      if a class has no examples.
    """
    if len(np.unique(labels)) < 2:
        return 0.5
    values = np.unique(scores)
    candidates = np.concatenate([(values[1:] + values[:-1]) / 2, [0.5]])
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    # Scores of at least the threshold are called class 1.
    missed = np.searchsorted(positive, candidates) / len(positive)
    score = 1 - missed + np.searchsorted(negative, candidates) / len(negative)
    best = candidates[score >= score.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def at_threshold(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Returns the balanced accuracy of a threshold, for two classes; NaN without examples."""
    called = scores >= threshold
    found = [np.mean(called[labels == c] == bool(c)) for c in (0, 1) if (labels == c).any()]
    return float(np.mean(found)) if found else float("nan")


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float]:
    """Returns mean and sample standard deviation of the values that are not NaN; NaN if too few."""
    array = np.array([v for v in values if v is not None and np.isfinite(v)], float)
    mean = float(array.mean()) if len(array) else float("nan")
    return mean, float(array.std(ddof=1)) if len(array) > 1 else float("nan")


def spread_text(mean: float, spread: float) -> str:
    """Returns a mean and its standard deviation as text, without what is undefined."""
    if not np.isfinite(mean):
        return "-"
    return f"{mean:.3f}" + (f" ± {spread:.3f}" if np.isfinite(spread) else "")
