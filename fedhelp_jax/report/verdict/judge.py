"""Judges methods against an alternative: for each hospital, and for all small or large ones."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.report.dice import ExampleDice
from fedhelp_jax.report.run_data import RunData
from fedhelp_jax.report.verdict.gain import Gain, gain
from fedhelp_jax.report.verdict.guard import guarded
from fedhelp_jax.report.verdict.hospitals import (
    METRICS,
    OWN_THRESHOLD,
    Hospital,
    deployed_model,
    estimate,
    hospitals_of,
)
from fedhelp_jax.report.verdict.influence import Estimate, mean_of_examples
from fedhelp_jax.report.verdict.rules import AS_RUN, GUARDED

_log = logging.getLogger(__name__)

ALL = {"small": "all small", "large": "all large"}

# The metrics by test image or hospital, of one run: {metric: {hospital: estimate}}.
Measured = Mapping[str, Mapping[str, Estimate]]


class Verdict(NamedTuple):
    """What a method does for a hospital, or for all hospitals of a role.

    Attributes:
      place: Name of the data set, or of its folder in a study.
      method: Label of the method.
      metric: The metric.
      hospital: Name of the hospital, or one of `ALL`.
      role: "small" or "large".
      ours: The metric under the method; the mean over seeds, and over hospitals.
      theirs: The same under the alternative.
      gain: The difference.
      fewest: The number of test images in the smallest class that a hospital has any of, under any
        seed; of all test images for masks.
    """

    place: str
    method: str
    metric: str
    hospital: str
    role: str
    ours: float
    theirs: float
    gain: Gain
    fewest: int

    @property
    def is_of_all(self) -> bool:
        """Whether it is on all hospitals of a role."""
        return self.hospital in ALL.values()


class _Alternative(NamedTuple):
    """The alternative under one seed: its hospitals, and what was measured on them."""

    hospitals: Mapping[str, Hospital]
    measured: Measured


class _Pair(NamedTuple):
    """What was measured under one seed: the role of each hospital, ours, and the alternative."""

    roles: Mapping[str, str]
    ours: Measured
    theirs: Measured


def judge(
    runs: Sequence[RunData],
    against: str,
    rule: str = AS_RUN,
    metric: str | None = None,
    groups: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> list[Verdict]:
    """Returns the verdicts on every method but the alternative.

    Only seeds that both have run with count, and hospitals that have not diverged in either and
    were tested on the same images; a warning names those that were not.

    Args:
      runs: Runs with their predictions, or the Dice of their test images.
      against: Label of the alternative, such as "local": staying alone.
      rule: What a hospital deploys; see
        `fedhelp_jax.report.verdict.hospitals.deployed_model`, or "guarded", for which see
        `fedhelp_jax.report.verdict.guard`. The alternative deploys by the same rule, or what its
        run did if the rule is "guarded".
      metric: The only metric to judge by; None takes all.
      groups: Names of hospitals by the title of a group, which gets a verdict too. All hospitals of
        a group have the same role. A group with a title of `ALL` takes the place of that mean.

    Raises:
      UserError: If the rule chooses among models, but a run is about masks.
    """
    verdicts = []
    by_place: dict[str, list[RunData]] = {}
    for run in runs:
        if run.summary and run.summary.get("split") == "test":
            by_place.setdefault(run.place or run.dataset, []).append(run)
    for place, own in by_place.items():
        theirs = {run.seed: _alternative(run, rule, metric) for run in own if run.label == against}
        for method in dict.fromkeys(run.label for run in own if run.label != against):
            matched = [run for run in own if run.label == method and run.seed in theirs]
            pairs = [_pair(run, theirs[run.seed], rule, metric) for run in matched]
            verdicts += _of_method(place, method, pairs, groups)
    return verdicts


def wrong_by_chance(verdicts: Sequence[Verdict]) -> float:
    """Returns how many verdicts on single hospitals would be wrong if nobody gained or lost."""
    return 0.05 * sum(not v.is_of_all for v in verdicts)


def _alternative(run: RunData, rule: str, metric: str | None) -> _Alternative:
    hospitals, rule = hospitals_of(run), AS_RUN if rule == GUARDED else rule
    return _Alternative(hospitals, _measured(run, hospitals, rule, metric, {}))


def _pair(run: RunData, other: _Alternative, rule: str, metric: str | None) -> _Pair:
    """Returns what was measured in a run, without hospitals that were tested on other images."""
    theirs = other.measured
    ours = _measured(run, hospitals_of(run), rule, metric, other.hospitals)
    apart = {
        name
        for key, own in ours.items()
        for name, found in own.items()
        if name in theirs.get(key, {}) and not found.has_examples_of(theirs[key][name])
    }
    if apart:
        _log.warning(
            "verdict: left out, as not tested on the same images as in the run that %s is "
            "compared with: %s",
            run.folder,
            ", ".join(sorted(apart)),
        )
    roles = {c["name"]: c["role"] for c in run.summary["per_client"] if c["name"] not in apart}
    return _Pair(roles, ours, theirs)


def _measured(
    run: RunData,
    found: Mapping[str, Hospital],
    rule: str,
    metric: str | None,
    alone: Mapping[str, Hospital],
) -> dict[str, dict[str, Estimate]]:
    """Returns the metrics of the model that each hospital deploys, on its test images.

    Raises:
      UserError: If the rule chooses among models, but the run is about masks.
    """
    if run.dice:
        if rule != AS_RUN:
            raise UserError(
                f"{run.folder}: --deploys={rule} is for classification; of masks, a run saves the "
                "Dice of the deployed model only"
            )
        return {"dice": {own.client: _of_dice(own) for own in run.dice}}
    defined = METRICS if len(run.classes) == 2 else [m for m in METRICS if m != OWN_THRESHOLD]
    return {name: _deployed(found, alone, rule, name) for name in defined if metric in (None, name)}


def _deployed(
    found: Mapping[str, Hospital], alone: Mapping[str, Hospital], rule: str, metric: str
) -> dict[str, Estimate]:
    """Returns the metric of what each hospital deploys by a rule."""
    if rule != GUARDED:
        return {
            name: estimate(metric, own, deployed_model(own, rule, metric))
            for name, own in found.items()
        }
    return {
        name: estimate(metric, found[name], model)
        if model is not None
        else estimate(metric, alone[name], alone[name].deployed)
        for name, model in guarded(found, alone, metric).items()
    }


def _of_dice(own: ExampleDice) -> Estimate:
    known = np.isfinite(own.dice)
    return mean_of_examples(own.examples[known], own.dice[known])


def _of_method(
    place: str, method: str, pairs: Sequence[_Pair], groups: Mapping[str, Collection[str]]
) -> list[Verdict]:
    """Returns a method's verdicts on each hospital, then on all of each role and group."""
    roles = {name: role for pair in pairs for name, role in pair.roles.items()}
    titles = roles | {t: r for r, t in ALL.items() if list(roles.values()).count(r) > 1}
    titles |= {t: roles[n] for t, names in groups.items() for n in names if n in roles}
    verdicts = []
    for metric in dict.fromkeys(metric for pair in pairs for metric in pair.ours):
        for title, role in titles.items():
            found = []
            for pair in pairs:
                of_role = [n for n, r in pair.roles.items() if title in (n, ALL[r])]
                named = [n for n in pair.roles if n in groups.get(title, of_role)]
                differences = _differences(pair, metric, named)
                if differences:
                    found.append((pair, differences))
            if found:
                ours = _mean([(pair.ours[metric], by_name) for pair, by_name in found])
                theirs = _mean([(pair.theirs[metric], by_name) for pair, by_name in found])
                total = gain([by_name for _, by_name in found])
                fewest = min(d.fewest for _, by_name in found for d in by_name.values())
                verdicts.append(
                    Verdict(place, method, metric, title, role, ours, theirs, total, fewest)
                )
    return verdicts


def _differences(pair: _Pair, metric: str, names: Sequence[str]) -> dict[str, Estimate]:
    """Returns the differences that are defined, by hospital."""
    ours, theirs = pair.ours[metric], pair.theirs.get(metric, {})
    found = {n: ours[n].minus(theirs[n]) for n in names if n in ours and n in theirs}
    return {n: difference for n, difference in found.items() if math.isfinite(difference.value)}


def _mean(seeds: Sequence[tuple[Mapping[str, Estimate], Mapping[str, Estimate]]]) -> float:
    """Returns the mean over seeds of the mean over the hospitals that have a difference."""
    return float(np.mean([np.mean([own[n].value for n in by_name]) for own, by_name in seeds]))
