"""Tests the guard: what it expects of a model, whom it keeps alone, and what that costs."""

import csv
import functools
import math

import numpy as np
import pytest
from made_up_runs import hospital, study_of

from fedhelp_jax.cli.main import main
from fedhelp_jax.report.verdict.guard import guarded, shrunken

METRIC = "balanced_accuracy"
HOSPITALS, NOISE, TRIALS = 20, 0.05, 2000


@functools.cache
def trials(mean, spread):
    """The true differences of many federations, measured ones, and the guard's expectations."""
    rng = np.random.default_rng(0)
    true = rng.normal(mean, spread, (TRIALS, HOSPITALS))
    measured = rng.normal(true, NOISE)
    expected = [
        list(shrunken({str(i): (d, NOISE**2) for i, d in enumerate(row)}).values())
        for row in measured
    ]
    return true, measured, np.array(expected)


def test_the_expectation_is_that_of_bayes():
    """By a sum over a grid of mu, tau and the true differences."""
    d, v = np.array([0.1, -0.05]), np.array([0.05, 0.1]) ** 2
    mu, tau = np.linspace(-0.5, 0.5, 201), 0.005 * (np.arange(120) + 0.5)
    truth = np.linspace(-0.8, 0.8, 641)
    prior = np.exp(-((truth - mu[:, None, None]) ** 2) / 2 / tau[:, None] ** 2) / tau[:, None]
    each = [prior * np.exp(-((x - truth) ** 2) / 2 / var) for x, var in zip(d, v, strict=True)]
    joint = np.exp(-(mu[:, None] ** 2) / 0.02 - tau**2 / 0.02)
    total = np.sum(joint * each[0].sum(-1) * each[1].sum(-1))
    first = np.sum(joint * (each[0] @ truth) * each[1].sum(-1)) / total
    second = np.sum(joint * each[0].sum(-1) * (each[1] @ truth)) / total
    found = shrunken({"a": (d[0], v[0]), "b": (d[1], v[1])})
    np.testing.assert_allclose([found["a"], found["b"]], [first, second], atol=5e-4)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("mean", [-0.03, -0.01, 0.0, 0.01, 0.03])
def test_the_guard_hedges_between_all_and_each_hospitals_own_images(mean, spread):
    """By the mean true difference of what is deployed, in which alone is 0.

    Where joining helps or harms on average, it is worth up to 0.008 more than what each hospital's
    own images say. Where it does so only by hospital, it costs at most 0.001.
    """
    true, measured, expected = trials(mean, spread)
    ours, plain = np.mean(true * (expected > 0)), np.mean(true * (measured > 0))
    assert ours > plain - 0.001
    if abs(mean) > spread:
        assert ours > plain + 0.001
    assert ours > max(0.0, np.mean(true)) - 0.003  # to stay alone, and to join, without looking
    if spread >= NOISE:  # what it expects comes true also where it has chosen
        optimism = np.mean((expected - true)[expected > 0])
        assert abs(optimism) < np.mean((measured - true)[measured > 0]) / 5


def test_the_best_of_several_models_is_not_believed():
    """The largest of ten measured differences is far above 0 where all true ones are 0."""
    rng = np.random.default_rng(0)
    best, plain = [], []
    for _ in range(200):
        measured = rng.normal(0, NOISE, (10, HOSPITALS))
        expected = [shrunken({str(i): (d, NOISE**2) for i, d in enumerate(m)}) for m in measured]
        best.append(np.mean([max(e[str(i)] for e in expected) for i in range(HOSPITALS)]))
        plain.append(np.mean(measured.max(0)))
    assert np.mean(plain) > 0.07
    assert np.mean(best) < 0.03


def test_few_images_count_little_and_none_nothing():
    measured = {
        "many": (0.2, 1e-5),
        "few": (-0.3, 1.0),
        "none": (0.0, math.inf),
        "other": (0.1, 1e-5),
    }
    found = shrunken(measured)
    assert abs(found["many"] - 0.2) < 0.01 and abs(found["other"] - 0.1) < 0.01
    for name in ("few", "none"):
        assert 0.05 < found[name] < 0.15  # as the others, less for the prior
    assert shrunken({"only": (0.2, 0.01)})["only"] > 0.05
    assert shrunken({"only": (-0.2, 0.01)})["only"] < -0.05
    assert shrunken({"a": (0.0, math.inf)}) == {"a": 0.0}


def test_a_hospital_takes_the_best_of_what_it_has_or_stays_alone():
    alone = {name: hospital(personal=0.75) for name in ("gains", "loses", "new")}
    joined = {
        "gains": hospital(personal=0.9, **{"global": 0.95}),
        "loses": hospital(personal=0.1, **{"global": 0.2}),
        "stranger": hospital(personal=1.0),
    }
    assert guarded(joined, alone, METRIC) == {"gains": "global", "loses": None}
    blind = joined | {"gains": joined["gains"]._replace(validation={})}
    assert guarded(blind, alone, METRIC)["gains"] is None  # as the other has measured a loss


def test_the_verdict_under_the_guard_is_between_alone_and_joined(tmp_path, capsys):
    study_of(tmp_path, seeds=2, local=0.0, better=3.0, worse=-3.0)
    gains = {}
    for rule in ("as_run", "guarded"):
        assert main(["fedhelp", "verdict", str(tmp_path), f"--deploys={rule}"]) == 0
        with (tmp_path / "verdict.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["hospital"] == "all small"]
        gains[rule] = {r["method"]: float(r["gain"]) for r in rows if r["metric"] == "auroc"}
        assert {row["deployed"] for row in rows} == {rule}
    assert gains["as_run"]["worse"] < -0.05
    assert gains["guarded"]["worse"] == 0.0
    assert gains["guarded"]["better"] > 0.05
    capsys.readouterr()
