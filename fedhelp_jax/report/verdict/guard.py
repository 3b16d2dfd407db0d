"""Whether a hospital should deploy a federation's model at all, by what its validation images say.

A small hospital's validation images say little, and the best of several models looks better on them
than it is. Both are corrected by looking at all hospitals at once, as in a meta-analysis of random
effects. With ``d_h`` the difference that hospital h measures on its validation images between a
model and the one it has when alone, ``v_h`` its variance, and ``t_h`` the true difference::

    d_h ~ N(t_h, v_h)     t_h ~ N(mu, tau^2)     mu ~ N(0, 0.1^2)     tau ~ |N(0, 0.1^2)|
    m_h = E[t_h | all d] = E[ mu + tau^2 / (tau^2 + v_h) (d_h - mu) | all d ]

The priors say that differences of a metric in [0, 1] are rarely above 0.2. The expectation over tau
is a sum over a grid (Roever, "Bayesian random-effects meta-analysis using the bayesmeta R package",
Journal of Statistical Software 93, 2020). A hospital deploys the model with the largest ``m_h`` if
that is positive, and otherwise stays alone; such an expectation needs no correction for having been
selected (Efron, "Tweedie's formula and selection bias", JASA 106, 2011). No test image takes part.
Each hospital must tell the server two numbers per model.
"""

import math
from collections.abc import Mapping

import numpy as np

from fedhelp_jax.report.verdict.gain import variance
from fedhelp_jax.report.verdict.hospitals import Hospital, estimate
from fedhelp_jax.report.verdict.influence import Estimate

# The deviation of the priors, and the values of tau in the sum.
_SCALE = 0.1
_GRID = 5 * _SCALE * (np.arange(100) + 0.5) / 100


def guarded(
    joined: Mapping[str, Hospital], alone: Mapping[str, Hospital], metric: str
) -> dict[str, str | None]:
    """Returns the model that each hospital deploys, None if it stays alone.

    Args:
      joined: The hospitals after a federation, by name.
      alone: The same hospitals after training alone. A hospital that is missing here stays out.
      metric: One of `fedhelp_jax.report.verdict.hospitals.METRICS`.
    """
    chosen: dict[str, str | None] = {}
    for role in dict.fromkeys(hospital.role for hospital in joined.values()):
        names = [n for n, h in joined.items() if h.role == role and n in alone]
        best = dict.fromkeys(names, 0.0)
        chosen |= dict.fromkeys(names)
        for model in dict.fromkeys(model for name in names for model in joined[name].test):
            measured = {
                name: _difference(joined[name], alone[name], model, metric)
                for name in names
                if model in joined[name].test
            }
            for name, expected in shrunken(measured).items():
                if expected > best[name]:
                    best[name], chosen[name] = expected, model
    return chosen


def shrunken(measured: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Returns the expected true difference of each hospital; see the top of the file.

    Args:
      measured: The difference and its variance by hospital; an infinite variance if it has measured
        nothing.
    """
    values, variances = np.array(list(measured.values())).T
    weight = 1 / (variances + _GRID[:, None] ** 2)  # [tau, hospital]
    total, seen = weight.sum(1), weight @ values
    precision = 1 / _SCALE**2 + total
    mean = seen / precision
    known = np.isfinite(variances)
    log_posterior = 0.5 * (
        np.log(weight[:, known]).sum(1)
        - np.log(precision)
        - weight @ values**2
        + seen**2 / precision
        - (_GRID / _SCALE) ** 2
    )
    posterior = np.exp(log_posterior - log_posterior.max())
    own = _GRID[:, None] ** 2 * weight * (values - mean[:, None])
    expected = (posterior / posterior.sum()) @ (mean[:, None] + own)
    return dict(zip(measured, expected.tolist(), strict=True))


def _difference(ours: Hospital, theirs: Hospital, model: str, metric: str) -> tuple[float, float]:
    """Returns the difference on validation images, and its variance."""
    if model in ours.validation and theirs.deployed in theirs.validation:
        own = estimate(metric, ours, model, "validation")
        other = estimate(metric, theirs, theirs.deployed, "validation")
        if _comparable(own, other):
            difference = own.minus(other)
            return difference.value, variance(difference)
    return 0.0, math.inf


def _comparable(own: Estimate, other: Estimate) -> bool:
    return math.isfinite(own.value - other.value) and own.has_examples_of(other)
