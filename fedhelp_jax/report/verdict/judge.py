"""Judges methods against an alternative: for each hospital, and for all small or large ones."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedhelp_jax.report.dice import ExampleDice
from fedhelp_jax.report.run_data import RunData
from fedhelp_jax.report.verdict.gain import Gain, gain
from fedhelp_jax.report.verdict.hospitals import (
    METRICS,
    OWN_THRESHOLD,
    Hospital,
    deployed_model,
    estimate,
    hospitals_of,
)
from fedhelp_jax.report.verdict.influence import Estimate, mean_of_examples

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
    """

    place: str
    method: str
    metric: str
    hospital: str
    role: str
    ours: float
    theirs: float
    gain: Gain


def judge(runs: Sequence[RunData], against: str, rule: str = "as_run") -> list[Verdict]:
    """Returns the verdicts on every method but the alternative, the same for every seed.

    Only seeds that both have run with count, and hospitals that have not diverged in either.

    Args:
      runs: Runs with their predictions, or the Dice of their test images.
      against: Label of the alternative, such as "local": staying alone.
      rule: What a hospital deploys; see
        `fedhelp_jax.report.verdict.hospitals.deployed_model`. The alternative deploys what its
        run did.
    """
    verdicts = []
    by_place: dict[str, list[RunData]] = {}
    for run in runs:
        if run.summary and run.summary.get("split") == "test":
            by_place.setdefault(run.place or run.dataset, []).append(run)
    for place, own in by_place.items():
        theirs = {run.seed: _measured(run, "as_run") for run in own if run.label == against}
        for method in dict.fromkeys(run.label for run in own if run.label != against):
            matched = [run for run in own if run.label == method and run.seed in theirs]
            pairs = [(_measured(run, rule), theirs[run.seed]) for run in matched]
            roles = {c["name"]: c["role"] for run in matched for c in run.summary["per_client"]}
            verdicts += _of_method(place, method, roles, pairs)
    return verdicts


def _measured(run: RunData, rule: str) -> dict[str, dict[str, Estimate]]:
    """Returns the metrics of the model that each hospital deploys, on its test images."""
    if run.dice:
        return {"dice": {own.client: _of_dice(own) for own in run.dice}}
    found = hospitals_of(run)
    metrics = METRICS if len(run.classes) == 2 else [m for m in METRICS if m != OWN_THRESHOLD]
    return {
        metric: {name: _of(metric, hospital, rule) for name, hospital in found.items()}
        for metric in metrics
    }


def _of(metric: str, hospital: Hospital, rule: str) -> Estimate:
    return estimate(metric, hospital, deployed_model(hospital, rule, metric))


def _of_dice(own: ExampleDice) -> Estimate:
    known = np.isfinite(own.dice)
    return mean_of_examples(own.examples[known], own.dice[known])


def _of_method(
    place: str, method: str, roles: Mapping[str, str], pairs: Sequence[tuple[Measured, Measured]]
) -> list[Verdict]:
    """Returns a method's verdicts on each hospital, then on all of each role."""
    verdicts = []
    groups = {name: (role, [name]) for name, role in roles.items()}
    for role, title in ALL.items():
        members = [name for name in roles if roles[name] == role]
        if len(members) > 1:
            groups[title] = role, members
    for metric in dict.fromkeys(metric for ours, _ in pairs for metric in ours):
        for title, (role, members) in groups.items():
            differences, ours, theirs = [], [], []
            for mine, other in pairs:
                both = [n for n in members if n in mine[metric] and n in other.get(metric, {})]
                both = [n for n in both if _defined(mine[metric][n], other[metric][n])]
                differences.append({n: mine[metric][n].minus(other[metric][n]) for n in both})
                ours += [np.mean([mine[metric][n].value for n in both])] if both else []
                theirs += [np.mean([other[metric][n].value for n in both])] if both else []
            if ours:
                means = float(np.mean(ours)), float(np.mean(theirs))
                verdicts.append(
                    Verdict(place, method, metric, title, role, *means, gain(differences))
                )
    return verdicts


def _defined(ours: Estimate, theirs: Estimate) -> bool:
    return math.isfinite(ours.value) and math.isfinite(theirs.value)
