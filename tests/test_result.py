"""`fh.run` and `fh.load_run`: what ``fedhelp train`` does, and its result, from Python."""

import csv
import json

import numpy as np
import pytest
import tiny_config
from helpers import refusal

import fedhelp_jax as fh
from fedhelp_jax.experiments.experiment import build_experiment

pytestmark = pytest.mark.slow


def config(**changes):
    found = tiny_config.get_config()
    found.model.small = found.model.large = "cnn_small"
    found.rounds = 3
    for key, value in changes.items():
        setattr(found, key, value)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fh.run(config(), tmp_path_factory.mktemp("result") / "run")


def test_it_is_the_run_folder_in_python(finished):
    assert finished.summary == json.loads((finished.folder / "summary.json").read_text())
    assert finished.history["round"] == [1, 2, 3] and len(finished.history["loss"]) == 3
    with (finished.folder / "clients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert finished.clients["client"] == [row["client"] for row in rows]
    assert [v is None for v in finished.clients["value"]] == [row["value"] == "" for row in rows]
    again = fh.load_run(finished.folder)
    assert again.summary == finished.summary and again.config == finished.config


def test_tables_become_pandas(finished):
    pd = pytest.importorskip("pandas")
    assert isinstance(finished.history.to_pandas(), pd.DataFrame)


def test_predictions_are_those_that_were_measured(finished):
    dataset = build_experiment(finished.config).dataset
    columns = finished.clients
    for client in dataset.clients:
        logits = finished.predict(dataset.images[client.test], client=client.name)
        right = float(np.mean(logits.argmax(-1) == dataset.labels[client.test]))
        (row,) = [
            i
            for i, name in enumerate(columns["client"])
            if (name, columns["split"][i], columns["metric"][i])
            == (client.name, "test", "accuracy")
            and columns["model"][i] in ("personal", "large")
        ]
        assert columns["value"][row] == pytest.approx(right)
    assert "client_9" in refusal(lambda: finished.predict(dataset.images, client="client_9"))
    small = dataset.images[:2, :4]
    assert "images are [4, 8, 3]" in refusal(lambda: finished.predict(small, client="client_0"))


def test_callbacks_see_every_round_and_can_end_the_run(tmp_path):
    seen = []

    def stop_after_two(round, metrics, state):
        seen.append((round, metrics["round"], type(state).__name__))
        return round == 2

    result = fh.run(config(evaluate_every=3), tmp_path / "run", callbacks=[stop_after_two])
    assert seen == [(1, 1, "RunState"), (2, 2, "RunState")]
    assert result.summary["stopped_after"] == 2 and len(result.history["loss"]) == 2
    whole = fh.run(config(evaluate_every=3), tmp_path / "run")
    other = fh.run(config(evaluate_every=3), tmp_path / "other")
    assert whole.history["loss"] == other.history["loss"]
    assert whole.clients == other.clients


def test_without_a_folder_it_is_kept_as_long_as_the_result(tmp_path):
    result = fh.run(config(rounds=1))
    folder = result.folder
    assert folder.exists()
    result.save(tmp_path / "kept")
    with pytest.raises(fh.UserError, match="exists"):
        result.save(tmp_path / "kept")
    summary = result.summary
    del result
    assert not folder.exists()
    assert fh.load_run(tmp_path / "kept").summary == summary
