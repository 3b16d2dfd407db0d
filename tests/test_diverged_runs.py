"""Runs whose training leaves the numbers: how they end, go on, and stand in tables."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_config
from commands import CONFIG, fedhelp, read, train
from helpers import use_tiny_networks
from tiny_study import get_study

from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.experiments.study import Failed, compare, tune
from fedhelp_jax.experiments.sweep import sweep
from fedhelp_jax.experiments.sweep_blocks import Run

pytestmark = pytest.mark.slow

TOO_MUCH = 1e30
SGD = f"--config.optimizer=sgd --config.learning_rate={TOO_MUCH}"
DIVERGING = f"--config.algorithm.name=local {SGD}"


@pytest.fixture(scope="module", autouse=True)
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_networks(patch)
        yield


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A run all of whose clients diverge; not to be changed."""
    workdir = tmp_path_factory.mktemp("diverged") / "run"
    assert train(workdir, DIVERGING) == 1
    return workdir


@pytest.fixture
def run(diverged, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(diverged, tmp_path / "run"))


def test_it_ends_before_its_last_round_and_is_saved(diverged):
    rows = read(diverged / "metrics.jsonl")
    summary = read(diverged / "summary.json")
    assert summary["stopped_after"] == len(rows) < summary["rounds"]
    assert (diverged / "checkpoints").is_dir()
    assert rows[-1]["diverged"]["large"] == ["client_0"]
    # Nothing travels in local training.
    assert summary["quarantined"] == {"small": 0, "large": 0}


def test_the_summary_gives_no_mean_and_no_metric_out_of_its_range(diverged):
    summary = read(diverged / "summary.json")
    assert summary["diverged"]["large"] == 1
    assert summary["large_mean"] is None
    assert summary["gap"] is None
    for client in summary["per_client"]:
        for name, value in client["metrics"].items():
            assert value is None or name in ("loss", "non_finite") or 0 <= value <= 1
        if client["metrics"]["non_finite"] == client["n_test"]:
            assert client["diverged"]
            assert client["metrics"]["accuracy"] == 0
            assert client["metrics"]["auroc"] is None


def test_the_same_command_ends_so_again_and_makes_no_round(run, capfd):
    before = read(run / "metrics.jsonl")
    capfd.readouterr()
    assert train(run, DIVERGING) == 1
    out, err = capfd.readouterr()
    assert read(run / "metrics.jsonl") == before
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("fedhelp: ")]
    assert "every large client has diverged" in line or "every small and large" in line
    assert "client_0 (diverged)" in out
    assert fedhelp(f"show {run}") == 0
    assert "clients diverged" in capfd.readouterr().out


def test_it_goes_on_where_that_is_asked_for(run):
    rounds = len(read(run / "metrics.jsonl")) + 1
    asked = f"--config.on_divergence=continue --config.rounds={rounds}"
    assert train(run, f"{DIVERGING} {asked}") == 0
    summary = read(run / "summary.json")
    assert summary["stopped_after"] is None
    assert summary["large_mean"] is None
    assert len(read(run / "metrics.jsonl")) == rounds


def test_evaluate_measures_it_again(run, capfd):
    before = read(run / "summary.json")
    assert fedhelp(f"evaluate --workdir={run}") == 1
    assert "has diverged" in capfd.readouterr().err
    assert read(run / "summary.json")["per_client"] == before["per_client"]


def test_evaluate_looks_at_no_round_after_the_one_it_measures(run, capfd):
    """A killed run may have written down more rounds than it saved."""
    rows = read(run / "metrics.jsonl")
    later = {**rows[-1], "round": len(rows) + 1, "diverged": {"small": [], "large": []}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    assert fedhelp(f"evaluate --workdir={run}") == 1
    assert f"has diverged by round {len(rows)}" in capfd.readouterr().err


def test_the_first_round_is_told_with_role_and_client(tmp_path, caplog):
    """Of a method whose uploads count: they are left out, and the server keeps its model."""
    workdir = tmp_path / "run"
    rest = f"--config.algorithm.name=fedavg {SGD}"
    assert train(workdir, rest) == 1
    told = [text for text in caplog.messages if "NaN or infinity in the training of" in text]
    assert told[0].startswith("round 1: ")
    assert "large client_0 (" in told[0]
    assert "left out of the server's mean" in told[0]
    summary, rows = read(workdir / "summary.json"), read(workdir / "metrics.jsonl")
    assert rows[0]["quarantined"]["large"] == 1
    for role in ("small", "large"):
        assert summary["quarantined"][role] == sum(row["quarantined"][role] for row in rows)


# --- among other runs ---


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def a_study(**changes):
    methods = {
        "fedhelp": {"optimizer": "sgd", "learning_rate": 1e-3},
        "wild": {"algorithm.name": "local", "optimizer": "sgd", "learning_rate": TOO_MUCH},
    }
    small = {
        "datasets": {"tiny": tiny_config.get_config()},
        "budgets": {"": {"rounds": 4}},
        "methods": methods,
        "seeds": (0,),
    }
    return dataclasses.replace(get_study(), **small | changes)


def test_a_comparison_tells_it_and_gives_it_no_score(tmp_path, capfd):
    compare(a_study(), tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "Diverged (NaN or infinity): wild seed 0 (" in text
    assert "no score" in text
    rows = {r["method"]: r for r in table(tmp_path / "runs.csv")}
    assert rows["wild"]["small_mean"] == rows["wild"]["large_mean"] == ""
    assert int(rows["wild"]["diverged"]) > 0
    assert rows["fedhelp"]["diverged"] == "0"
    assert float(rows["fedhelp"]["small_mean"]) > 0
    # It is finished, so nothing is run again.
    capfd.readouterr()
    compare(a_study(), tmp_path)
    assert "2 of 2 runs are finished" in capfd.readouterr().out
    # But where it is told to go on, it does.
    compare(a_study(budgets={"": {"rounds": 4, "on_divergence": "continue"}}), tmp_path)
    assert "1 of 2 runs are finished" in capfd.readouterr().out
    assert read(tmp_path / "tiny/wild/seed0/summary.json")["stopped_after"] is None


def test_a_trial_that_diverged_is_never_chosen(tmp_path):
    grid = {"learning_rate": (TOO_MUCH, 1e-3)}
    methods = {"fedhelp": {"algorithm.name": "local", "optimizer": "sgd"}}
    study = a_study(methods=methods, grids={"fedhelp": grid}, trials=2)
    chosen, failures = tune(study, tmp_path)
    assert not failures
    assert chosen["tiny", "fedhelp"] == {"learning_rate": 1e-3}
    rows = table(tmp_path / "tuning.csv")
    assert [(r["diverged"], r["chosen"]) for r in rows] == [("1", "0"), ("0", "1")]
    assert rows[0]["validation"] == ""


def test_a_method_all_of_whose_trials_diverged_is_not_compared(tmp_path):
    grids = {"fedhelp": {"learning_rate": (1e-3,)}, "wild": {"learning_rate": (TOO_MUCH,)}}
    with pytest.raises(Failed, match="wild.*every trial has diverged"):
        compare(a_study(grids=grids, trials=1), tmp_path)
    assert "wild" not in (tmp_path / "comparison.md").read_text()
    assert "fedhelp" in (tmp_path / "comparison.md").read_text()


def test_in_a_sweep_the_others_go_on(tmp_path, caplog):
    runs = []
    for rate in (TOO_MUCH, 1e-3):
        settings = {"algorithm.name": "local", "optimizer": "sgd", "rounds": 4}
        flags = [f"--config.{k}={v}" for k, v in (settings | {"learning_rate": rate}).items()]
        runs.append(Run({"learning_rate": rate}, read_settings(str(CONFIG), flags)))
    wild, calm = sweep(runs, tmp_path, say=lambda text: None)
    (line, *_) = caplog.messages
    assert line.startswith(f"learning_rate {TOO_MUCH}: round 1: NaN or infinity in the training of")
    assert not any("learning_rate 0.001" in line for line in caplog.messages)
    assert wild["diverged"] > 0
    assert wild["large_mean"] is None
    assert calm["diverged"] == 0
    assert np.isfinite(calm["large_mean"])
