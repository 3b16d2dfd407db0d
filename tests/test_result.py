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


def test_saved_predictions_are_those_of_every_deployed_model(finished):
    dataset = build_experiment(finished.config).dataset
    saved, measured = finished.predictions.to_pandas(), finished.clients.to_pandas()
    logits = saved.filter(like="logit ").to_numpy()
    saved["right"] = logits.argmax(-1) == saved["label"]
    keys = ["client", "model", "split"]
    accuracy = saved.groupby(keys)["right"].mean()
    known = measured[measured["metric"] == "accuracy"].set_index(keys)["value"].dropna()
    assert len(known) == len(accuracy) and set(saved["model"]) == {"personal", "global", "large"}
    assert np.allclose(accuracy.sort_index(), known.sort_index().astype(float))
    assert (dataset.labels[saved["example"]] == saved["label"]).all()
    client = dataset.clients[0]
    own = saved[(saved["client"] == client.name) & (saved["split"] == "test")]
    own = own[own["model"].isin(["personal", "large"])]
    again = finished.predict(dataset.images[own["example"]], client=client.name)
    assert np.allclose(logits[own.index], again, atol=1e-4)


def test_the_history_has_every_client_and_the_summary_the_teacher(finished):
    metric, names = finished.summary["metric"], finished.summary["per_client"]
    last = finished.history["clients"][-1]
    assert {role: len(v) for role, v in last.items()} == {
        role: sum(c["role"] == role for c in names) for role in last
    }
    known = [v for v in last["small"] if v is not None]
    assert np.mean(known) == pytest.approx(finished.history["small_mean"][-1]), metric
    assert 0.7 < finished.summary["teacher_agreement"] <= 1.0  # simulated, at 0.85


def test_a_result_writes_its_report(finished, tmp_path):
    assert "<h1>fedhelp on phantoms (synthetic)</h1>" in finished.report(tmp_path).read_text()


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
