"""The end of a run measures one client of each role again, and stops where that disagrees."""

from pathlib import Path

import jax
import numpy as np
import pytest
from commands import CONFIG, fedhelp, read, train
from helpers import use_tiny_networks

from fedhelp_jax.core.errors import Failure
from fedhelp_jax.experiments import final_results
from fedhelp_jax.experiments import sweep as sweeps
from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.experiments.sweep_blocks import Run
from fedhelp_jax.simulation import recheck as rechecks
from fedhelp_jax.simulation.compiled import CompiledRounds

MASKS = Path(__file__).parent / "mask_config.py"


@pytest.fixture
def measured(monkeypatch):
    """What is measured once more, beside what the run's own program said."""
    found, results = [], []
    original = rechecks.measured_alone

    whole = rechecks.recheck

    def record(phases, group, public, state, dataset, row, split):
        again = original(phases, group, public, state, dataset, row, split)
        for model, metrics in again.items():
            found.append((results[-1][group.role][model], metrics, row))
        return again

    def remember(phases, groups, public, state, dataset, split, measured, **rest):
        results.append(measured)
        whole(phases, groups, public, state, dataset, split, measured, **rest)

    monkeypatch.setattr(rechecks, "measured_alone", record)
    for module in (final_results, sweeps):
        monkeypatch.setattr(module, "recheck", remember)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "rest",
    [
        "",
        "--config.algorithm.name=per_fedavg",  # deploys what it adapts on training images
        "--config.mapping.max_device_bytes=60000",
        "--config.mapping.chunk_size=3",
    ],
)
def test_another_program_measures_the_same(tmp_path, monkeypatch, measured, rest):
    use_tiny_networks(monkeypatch)
    assert train(tmp_path / "run", rest) == 0
    assert len(measured) >= 2
    for own, again, row in measured:
        for name in ("loss", "balanced_accuracy", "auroc"):
            np.testing.assert_allclose(own[name][row], again[name][0], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_so_it_is_of_masks(tmp_path, measured):
    flags = f"--config.mapping.cpu_devices={jax.device_count()} --workdir={tmp_path / 'run'}"
    assert fedhelp(f"train --config={MASKS}:2d {flags}") == 0
    assert len(measured) >= 2
    for own, again, row in measured:
        np.testing.assert_allclose(own["dice"][row], again["dice"][0], atol=1e-5)


def test_wrong_results_stop_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    use_tiny_networks(monkeypatch)
    evaluate = CompiledRounds.evaluate_examples

    def wrong(self, state, split):
        results, logits = evaluate(self, state, split)
        if split == "test":
            for metrics in results["large"].values():
                metrics["loss"] = metrics["loss"] * 1.01
        return results, logits

    monkeypatch.setattr(CompiledRounds, "evaluate_examples", wrong)
    assert train(tmp_path / "run") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "fedhelp: " in line]
    assert len(lines) == 1 and "Traceback" not in lines[0]
    assert "the test loss of " in lines[0] and "(large, " in lines[0]
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(CompiledRounds, "evaluate_examples", evaluate)
    assert fedhelp(f"evaluate --workdir={tmp_path / 'run'}") == 0
    assert read(tmp_path / "run" / "summary.json")["split"] == "test"


def runs_of(method):
    flags = (f"--config.algorithm.name={method}", "--config.rounds=2")
    settings = [read_settings(str(CONFIG), [*flags, f"--config.seed={seed}"]) for seed in (3, 4)]
    return [Run({"seed": config.seed}, config) for config in settings]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedhelp", "per_fedavg"])
def test_a_sweep_measures_clients_of_its_first_run_again(tmp_path, monkeypatch, measured, method):
    use_tiny_networks(monkeypatch)
    sweeps.sweep(runs_of(method), tmp_path, say=lambda text: None)
    assert len(measured) >= 2
    for own, again, row in measured:
        for name in ("loss", "balanced_accuracy", "auroc"):
            np.testing.assert_allclose(own[name][row], again[name][0], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_wrong_results_stop_a_sweep(tmp_path, monkeypatch):
    use_tiny_networks(monkeypatch)
    original = rechecks.measured_alone

    def wrong(*arguments):
        again = original(*arguments)
        return {model: {"loss": metrics["loss"] * 1.01} for model, metrics in again.items()}

    monkeypatch.setattr(rechecks, "measured_alone", wrong)
    with pytest.raises(Failure, match="the validation loss of "):
        sweeps.sweep(runs_of("local"), tmp_path, say=lambda text: None)
    assert not (tmp_path / "runs.jsonl").exists()
