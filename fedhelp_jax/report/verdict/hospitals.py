"""What each hospital can deploy after a run, with what it answered about its own images."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedhelp_jax.core.names import BETWEEN
from fedhelp_jax.report.numbers import best_threshold, softmax
from fedhelp_jax.report.predictions import Predictions
from fedhelp_jax.report.run_data import RunData
from fedhelp_jax.report.verdict.influence import (
    Estimate,
    auroc,
    average_precision,
    balanced_accuracy,
    of_answers,
)
from fedhelp_jax.report.verdict.rules import BEST, GLOBAL, INTERPOLATED, OWN

OWN_THRESHOLD = "balanced_accuracy_at_own_threshold"
PRECISION = "average_precision_of_rare_classes"
METRICS = ("auroc", PRECISION, "balanced_accuracy", OWN_THRESHOLD)  # the last for two classes


class Hospital(NamedTuple):
    """A client of a run, and the models that it could deploy.

    Attributes:
      name: Its name.
      role: "small" or "large".
      deployed: The model that the run deployed.
      test: What each model answered on its test images.
      validation: The same on its validation images, if it has any.
    """

    name: str
    role: str
    deployed: str
    test: Mapping[str, Predictions]
    validation: Mapping[str, Predictions]


def hospitals_of(run: RunData) -> dict[str, Hospital]:
    """Returns the hospitals of a run that have not diverged and have predictions, by name."""
    found = {}
    for client in run.summary.get("per_client") or []:
        if client.get("diverged"):
            continue
        own = [p for p in run.predictions if p.client == client["name"]]
        test = {p.model: p for p in own if p.split == "test"}
        if client["model"] not in test:
            continue
        validation = {p.model: p for p in own if p.split == "validation" and len(p.labels)}
        found[client["name"]] = Hospital(
            client["name"], client["role"], client["model"], test, validation
        )
    return found


def deployed_model(hospital: Hospital, rule: str, metric: str) -> str:
    """Returns the name of the model that a hospital deploys by a rule.

    Args:
      hospital: The hospital.
      rule: One of `fedhelp_jax.report.verdict.rules.RULES`. "as_run" takes the model that the run
        deployed, "own" the one that the hospital has trained itself, "global" the one that the
        server broadcast, and "best_on_validation" the one of these with the highest metric on its
        validation images; "interpolated" also considers the models between both. Where a hospital
        has no such model or no validation images, it is the one that the run deployed.
      metric: One of `METRICS`.
    """
    if rule in (BEST, INTERPOLATED):
        scores = {
            model: estimate(metric, hospital, model, "validation").value
            for model in hospital.test
            if model in hospital.validation
            and (rule == INTERPOLATED or not model.startswith(BETWEEN))
        }
        known = {model: value for model, value in scores.items() if np.isfinite(value)}
        best = max(known, key=lambda model: known[model], default=hospital.deployed)
        return hospital.deployed if known.get(hospital.deployed) == known.get(best) else best
    if rule == GLOBAL and GLOBAL in hospital.test:
        return GLOBAL
    if rule == OWN:
        return next((name for name in hospital.test if name != GLOBAL), hospital.deployed)
    return hospital.deployed


def estimate(metric: str, hospital: Hospital, model: str, split: str = "test") -> Estimate:
    """Returns a metric of one of a hospital's models, on its test or validation images."""
    own = (hospital.test if split == "test" else hospital.validation)[model]
    if metric == "auroc":
        return auroc(own.examples, own.labels, own.logits)
    if metric == PRECISION:
        return average_precision(own.examples, own.labels, own.logits)
    if metric == OWN_THRESHOLD and own.logits.shape[-1] == 2 and model in hospital.validation:
        chosen = hospital.validation[model]
        threshold = best_threshold(softmax(chosen.logits)[:, 1], chosen.labels)
        answers = (softmax(own.logits)[:, 1] >= threshold).astype(int)
        return of_answers(own.examples, own.labels, answers)
    return balanced_accuracy(own.examples, own.labels, own.logits)
