"""Statistics of a comparison: paired tests with Holm's correction, ranks, critical differences.

The functions use only NumPy and SciPy. Their arrays are ``[methods, blocks]``; a block is a data
set, or a data set and a seed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def paired_p_value(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns the two-sided p-value of a paired Student's t test; NaN for fewer than two pairs.

    If all pairs differ by the same amount up to rounding, there is no variance to test with. The
    result is then 1 if that amount is 0, else NaN.
    """
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    difference = difference[np.isfinite(difference)]
    if len(difference) < 2:
        return float("nan")
    if np.ptp(difference) < 1e-9:
        return 1.0 if abs(difference[0]) < 1e-9 else float("nan")
    result: Any = stats.ttest_1samp(difference, 0)
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values with Holm's step-down adjustment: ``max over j <= i of (m - j) p_(j)``.

    See Scand. J. Stat. 1979. NaNs stay NaN and do not count.

    Example:
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, float)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return [float(value) for value in adjusted]


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Returns the mean rank of each method over blocks; rank 1 is the best, ties share their mean.

    Args:
      values: ``[methods, blocks]``, larger is better; blocks with a NaN are left out.

    Returns:
      ``[methods]``; NaN if every block has a NaN.

    Example:
      >>> average_ranks(np.array([[0.9, 0.8], [0.7, 0.8], [0.1, 0.2]])).tolist()
      [1.25, 1.75, 3.0]
    """
    whole = values[:, np.isfinite(values).all(axis=0)]
    if not whole.size:
        return np.full(len(values), np.nan)
    return stats.rankdata(-whole, axis=0).mean(axis=1)


def critical_difference(methods: int, blocks: int, alpha: float = 0.05) -> float:
    """Returns by how much average ranks must differ (Nemenyi; Demsar, JMLR 2006, sec. 3.2.2).

    ``CD = q_alpha sqrt(k (k + 1) / (6 N))``, where ``q_alpha`` is the quantile of the studentized
    range divided by ``sqrt(2)``.

    Example:
      >>> round(critical_difference(4, 14), 2)  # Demsar's example, with q = 2.569
      1.25
    """
    q = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * blocks)))


def friedman_p_value(values: np.ndarray) -> float:
    """Returns the p-value of Friedman's test that all methods rank alike.

    Args:
      values: ``[methods, blocks]``, without NaN.

    Returns:
      The p-value; NaN for fewer than three methods or two blocks, or if all methods are equal in
      every block.
    """
    if len(values) < 3 or values.shape[1] < 2 or not np.ptp(values, axis=0).any():
        return float("nan")
    return float(stats.friedmanchisquare(*values).pvalue)
