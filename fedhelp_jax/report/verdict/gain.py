"""How much a hospital gains over an alternative, with an interval that holds."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from fedhelp_jax.report.verdict.influence import Estimate

# The verdict if the interval contains 0.
UNCLEAR = "unclear"
# How many examples are added to each class, on which the two models disagree.
_ADDED = 0.5
# The power at which "how many images it would take" is answered.
_POWER = 0.8


class Gain(NamedTuple):
    """A difference of two metrics, ours less theirs.

    Attributes:
      value: Mean difference over the seeds.
      low: Lower end of the 95 % interval.
      high: Upper end.
      probability: The probability that the true difference is positive.
      seeds: Number of seeds.
      examples: Number of different test examples.
      needed: The number of test examples with which a true difference of this size would be told
        from 0 four times out of five; infinity if it takes more seeds, not more examples.
    """

    value: float
    low: float
    high: float
    probability: float
    seeds: int
    examples: int
    needed: float

    @property
    def verdict(self) -> str:
        """Returns "gains", "loses" or `UNCLEAR`."""
        if self.low > 0:
            return "gains"
        return "loses" if self.high < 0 else UNCLEAR


def gain(differences: Sequence[Mapping[str, Estimate]], level: float = 0.95) -> Gain:
    """Returns the mean gain over seeds and hospitals, with its interval.

    With ``g_s`` the mean over hospitals of the difference under seed ``s``, and ``C`` the
    covariance of ``(g_1, ..., g_S)`` that comes from the test examples (seeds that share examples
    are correlated)::

        gain = mean_s g_s
        u    = max(0, var_s g_s - (tr C - sum C / S) / (S - 1))     variance between seeds alone
        SE^2 = sum C / S^2 + u / S
        gain -+ t SE                t: Student's quantile, degrees of freedom by Satterthwaite

    ``C`` is the sum over examples of the products of their influences. To each class, and under
    each seed, half an example is added on which the two models disagree, in favour of either alike
    (after Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24, 2005). Without it, two models that both answer all of
    three images rightly would be equal beyond doubt. A whole one made intervals much too wide.

    Args:
      differences: For each seed, the difference of each hospital by its name.
      level: Of the interval.

    Returns:
      The gain; NaN throughout if no difference is defined.
    """
    defined = [
        {name: d for name, d in by_name.items() if math.isfinite(d.value)}
        for by_name in differences
    ]
    defined = [by_name for by_name in defined if by_name]
    if not defined:
        nan = math.nan
        return Gain(nan, nan, nan, nan, 0, 0, nan)
    values = np.array([np.mean([d.value for d in by_name.values()]) for by_name in defined])
    covariance, degrees, examples = _covariance(defined)
    seeds, value = len(values), float(np.mean(values))
    sampling = float(covariance.sum()) / seeds**2
    between = spread = 0.0
    if seeds > 1:
        spread = float(np.var(values, ddof=1))
        expected = (np.trace(covariance) - covariance.sum() / seeds) / (seeds - 1)
        between = max(0.0, spread - float(expected))
    error = math.sqrt(sampling + between / seeds)
    uncertain = sampling**2 / degrees
    if seeds > 1:
        uncertain += (spread / seeds) ** 2 / (seeds - 1)
    freedom = max(1.0, error**4 / uncertain)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    return Gain(
        value,
        max(-1.0, value - half),
        min(1.0, value + half),
        float(stats.t.cdf(value / error, freedom)),
        seeds,
        examples,
        _needed(value, sampling, between / seeds, examples, level),
    )


def variance(difference: Estimate) -> float:
    """Returns the variance of one difference that comes from its examples; see `gain`."""
    covariance, _, _ = _covariance([{"": difference}])
    return float(covariance[0, 0])


def _covariance(
    differences: Sequence[Mapping[str, Estimate]],
) -> tuple[np.ndarray, float, int]:
    """Returns the covariance of the seeds' means, its degrees of freedom, and the examples."""
    seeds = len(differences)
    added, strata = np.zeros(seeds), set()
    examples, columns, influences = [], [], []
    for s, by_name in enumerate(differences):
        for name, d in by_name.items():
            _, first, index, counts = np.unique(
                d.strata, return_index=True, return_inverse=True, return_counts=True
            )
            factor = np.sqrt(counts / (counts + 1)) / len(by_name)
            added[s] += _ADDED * np.sum((factor * d.reach[first]) ** 2)
            strata.update((name, int(c)) for c in d.strata[first])
            examples.append(d.examples)
            columns.append(np.full(len(d.examples), s))
            influences.append(factor[index] * d.influence)
    # By example, since seeds may share test images, and so may hospitals.
    known, rows = np.unique(np.concatenate(examples), return_inverse=True)
    matrix = np.zeros((len(known), seeds))
    np.add.at(matrix, (rows, np.concatenate(columns)), np.concatenate(influences))
    covariance = matrix.T @ matrix + np.diag(added)
    return covariance, max(1.0, len(known) - len(strata)), len(known)


def _needed(value: float, sampling: float, seeds: float, examples: int, level: float) -> float:
    """Returns the number of examples that makes the standard error small enough for the value."""
    quantiles = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(_POWER)
    allowed = (value / quantiles) ** 2 - seeds
    return math.ceil(examples * sampling / allowed) if allowed > 0 else math.inf
