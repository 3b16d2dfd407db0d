"""Runs from the command line: what they leave, how they go on, what stops them."""

import csv
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fedhelp, read, refusal, train, train_command
from helpers import (
    FROM_IMAGES,
    assert_trees_close,
    assert_trees_equal,
    on_host,
    use_tiny_networks,
)
from tiny_config import get_config

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments import config as config_lib
from fedhelp_jax.experiments import experiment, identity, runner
from fedhelp_jax.experiments.checkpoint import Checkpointer
from fedhelp_jax.experiments.experiment import build_experiment
from fedhelp_jax.experiments.sweep_blocks import numbers, with_numbers
from fedhelp_jax.models.registry import MODELS
from fedhelp_jax.settings.schema import MappingConfig
from fedhelp_jax.simulation import vectorize
from fedhelp_jax.simulation.round import federation_arrays

TESTS = Path(__file__).parent
ROUNDS = 6
# name -> (training, test images, role); the last one's validation is empty.
CLIENTS = {
    "client_0": (36, 13, "large"),
    "client_1": (20, 8, "small"),
    "client_2": (11, 4, "small"),
    "client_3": (1, 1, "small"),
}
FIELDS = (
    "algorithm dataset synthetic teacher seed rounds metric small_mean large_mean worst_small gap "
    "evaluated per_client bytes_up_per_round bytes_down_per_round teacher_queries compile_s wall_s "
    "versions"
).split()


@pytest.fixture(scope="module", autouse=True)
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_networks(patch)
        yield


def stopped_run(workdir: Path, signal: str, where: str, round: int, environment=None):
    """The result of a process that a signal hits in its run."""
    script = [sys.executable, str(TESTS / "tiny_fedhelp.py"), signal, where, str(round)]
    return subprocess.run(
        [*script, *shlex.split(train_command(workdir))],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | (environment or {}),
    )


def without_times(values: dict) -> dict:
    return {k: v for k, v in values.items() if not k.endswith("_s") and k != "versions"}


def last_state(workdir: Path):
    run = build_experiment(config_lib.load(workdir / "config.json"))
    checkpointer = Checkpointer(workdir / "checkpoints")
    found = checkpointer.restore_latest(run.simulation.state_shapes())
    checkpointer.close()
    assert found is not None
    return found[:2]


def assert_same_run(workdir: Path, expected: Path):
    """As if it had never stopped: state bit for bit, files but for times, each round once."""
    (done, state), (all_rounds, final) = last_state(workdir), last_state(expected)
    assert done == all_rounds == ROUNDS
    assert_trees_equal(state, final)
    ours, theirs = read(workdir / "summary.json"), read(expected / "summary.json")
    assert without_times(ours) == without_times(theirs)
    rows = [without_times(row) for row in read(workdir / "metrics.jsonl")]
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert rows == [without_times(row) for row in read(expected / "metrics.jsonl")]
    assert (workdir / "clients.csv").read_bytes() == (expected / "clients.csv").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train(workdir) == 0
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- what a run leaves ---


@pytest.mark.slow
def test_the_summary_says_what_was_run(finished):
    summary = read(finished / "summary.json")
    assert set(FIELDS) <= set(summary)
    assert summary["algorithm"] == "fedhelp"
    assert summary["synthetic"] is True
    assert "phantom" in summary["dataset"]
    assert summary["teacher"] == "simulated (accuracy 0.85)"
    assert summary["teacher_queries"] == 12
    assert (summary["seed"], summary["rounds"]) == (0, ROUNDS)
    assert summary["evaluated"] == {"small": ["personal", "global"], "large": ["large", "global"]}
    assert summary["program"]["devices"] == jax.device_count()
    assert summary["wall_s"] > summary["compile_s"] > 0
    assert summary["versions"]["jax"] == jax.__version__


def test_the_summary_says_what_came_out(finished):
    summary = read(finished / "summary.json")
    assert summary["metric"] == "balanced_accuracy"
    clients = {c["name"]: c for c in summary["per_client"]}
    sizes = {name: (c["n_train"], c["n_test"], c["role"]) for name, c in clients.items()}
    assert sizes == CLIENTS
    deployed = {"small": "personal", "large": "large"}
    scores = {"small": [], "large": []}
    for client in clients.values():
        assert client["model"] == deployed[client["role"]]
        scores[client["role"]].append(client["metrics"]["balanced_accuracy"])
    assert summary["small_mean"] == pytest.approx(np.mean(scores["small"]))
    assert summary["worst_small"] == min(scores["small"])
    assert summary["large_mean"] == pytest.approx(np.mean(scores["large"]))
    assert summary["gap"] == pytest.approx(summary["large_mean"] - summary["small_mean"])


def test_the_summary_counts_what_travels(finished):
    """Small networks of 12 x 4 + 4 x 8 + 8 parameters and 8 statistics, and a counter downwards."""
    summary = read(finished / "summary.json")
    numbers = 12 * 4 + 4 * 8 + 8 + 8
    assert summary["bytes_up_per_round"] == len(CLIENTS) * 4 * numbers
    assert summary["bytes_down_per_round"] == len(CLIENTS) * 4 * (numbers + 1)


@pytest.mark.slow
def test_traffic_that_changes_by_round_is_counted_by_round(tmp_path):
    """FedKD sends factors: all of the mentee at first, then less, which clients say themselves."""
    run = tmp_path / "fedkd"
    energy = "--config.algorithm.energy_start=0.3 --config.algorithm.energy_end=0.3"
    assert train(run, f"--config.algorithm.name=fedkd --config.rounds=2 {energy}") == 0
    first, second = read(run / "metrics.jsonl")
    whole = len(CLIENTS) * 4 * (12 * 4 + 4 * 8 + 8 + 8)
    assert first["bytes_down"] == whole
    for less in (first["bytes_up"], second["bytes_up"], second["bytes_down"]):
        # Of each matrix at least a factor pair of rank 1 travels, and all that has one axis.
        assert len(CLIENTS) * 4 * (17 + 13 + 8 + 8) <= less < whole
    summary = read(run / "summary.json")
    for way in ("bytes_up", "bytes_down"):
        assert summary[f"{way}_per_round"] == round((first[way] + second[way]) / 2)
        assert way not in first["train"]["small"]


def test_every_round_stands_in_metrics_once(finished):
    rows = read(finished / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    for row in rows:
        assert math.isfinite(row["loss"]) and math.isfinite(row["small_mean"])
        assert set(row["train"]) == {"small", "large"}
        assert row["train"]["large"]["teacher_loss"] > 0
        assert row["metric"] == "balanced_accuracy" and row["split"] == "validation"
    assert rows[0]["compile_s"] > 0
    assert [row["compile_s"] for row in rows[1:]] == [0] * (ROUNDS - 1)


def test_clients_csv_has_every_value(finished):
    with (finished / "clients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    summary = read(finished / "summary.json")
    metrics = summary["per_client"][0]["metrics"]
    assert len(rows) == len(CLIENTS) * 2 * 2 * len(metrics)  # splits, models
    values = {
        tuple(row[k] for k in ("client", "model", "split", "metric")): row["value"] for row in rows
    }
    assert len(values) == len(rows)
    for client in summary["per_client"]:
        for metric, value in client["metrics"].items():
            text = values[client["name"], client["model"], "test", metric]
            assert text == ("" if value is None else str(value))


def test_what_one_image_cannot_tell_is_null(finished):
    """client_3 trains on one image, is tested on one, and has none to validate on."""
    clients = {c["name"]: c for c in read(finished / "summary.json")["per_client"]}
    metrics = clients["client_3"]["metrics"]
    assert metrics["auroc"] is None
    assert metrics["balanced_accuracy"] in (0.0, 1.0) and metrics["loss"] > 0
    with (finished / "clients.csv").open(newline="") as file:
        values = {
            row["metric"]: row["value"]
            for row in csv.DictReader(file)
            if (row["client"], row["split"]) == ("client_3", "validation")
        }
    assert values.pop("non_finite") == "0.0"  # of no image none
    assert set(values.values()) == {""}


def test_config_json_holds_the_settings(finished):
    config = config_lib.from_dict(read(finished / "config.json"))
    assert (config.rounds, config.data.image_size, config.roles.top_n) == (ROUNDS, 8, 1)


def test_evaluate_gives_the_summary_again(run, finished, capsys):
    for name in ("summary.json", "clients.csv"):
        (run / name).unlink()
    assert fedhelp(f"evaluate --workdir={run}") == 0
    assert "client_3" in capsys.readouterr().out
    assert_same_run(run, finished)


def test_a_finished_run_is_not_run_again(run, finished, capsys):
    assert train(run) == 0
    assert "round" not in capsys.readouterr().out.split("fedhelp on")[0]
    assert_same_run(run, finished)


def test_show_prints_it(finished, capsys):
    assert fedhelp(f"show {finished}") == 0
    out = capsys.readouterr().out
    for word in ("fedhelp", "synthetic", "simulated"):
        assert word in out


# --- stopped and going on ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "round", "saved"), [("after-row", 3, ["2"]), ("before-sums", 4, ["2", "4"])]
)
def test_a_killed_run_goes_on_to_the_same_end(
    finished, tmp_path, caplog, kept_programs, where, round, saved
):
    """Killed between two checkpoints, and compiled anew; killed in the middle of saving one."""
    workdir = tmp_path / "run"
    environment = kept_programs if where == "before-sums" else {}
    result = stopped_run(workdir, "SIGKILL", where, round, environment)
    assert result.returncode == -9, result.stderr
    folders = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    assert folders == saved
    assert len(read(workdir / "metrics.jsonl")) == round
    assert not (workdir / "summary.json").exists()
    assert train(workdir) == 0
    assert f"going on after round 2 of {ROUNDS}" in caplog.text
    assert ("was not saved to the end" in caplog.text) == (where == "before-sums")
    assert_same_run(workdir, finished)


@pytest.mark.slow
def test_an_interrupted_run_is_saved_and_goes_on(finished, tmp_path, capsys, caplog, kept_programs):
    workdir = tmp_path / "run"
    result = stopped_run(workdir, "SIGINT", "after-row", 3, kept_programs)
    assert result.returncode == 130, result.stderr
    assert f"stopped after round 3 of {ROUNDS}, saved in {workdir}" in result.stderr
    assert "stopping after this round" in result.stderr and "Traceback" not in result.stderr
    assert last_state(workdir)[0] == 3

    message = refusal(capsys, fedhelp(f"evaluate --workdir={workdir}"))
    assert f"stopped after round 3 of {ROUNDS}" in message and "train" in message
    assert train(workdir) == 0
    assert f"going on after round 3 of {ROUNDS}" in caplog.text
    assert_same_run(workdir, finished)


def test_a_corrupt_newest_checkpoint_is_passed_over(run, finished, capsys, caplog):
    newest = run / "checkpoints" / str(ROUNDS)
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    message = refusal(capsys, fedhelp(f"evaluate --workdir={run}"))
    assert f"stopped after round 4 of {ROUNDS}" in message
    caplog.clear()
    assert train(run) == 0
    for word in (str(newest), "cannot be read", f"going on after round 4 of {ROUNDS}"):
        assert word in caplog.text
    assert_same_run(run, finished)


# --- the folder of another run ---


def test_another_configuration_is_refused_by_its_keys(run, finished, capsys):
    rest = "--config.batch_size=7 --config.algorithm.lambda_b=0.5"
    message = refusal(capsys, train(run, rest))
    for word in (str(run), "batch_size: 16 -> 7", "algorithm.settings.lambda_b: 0.2 -> 0.5"):
        assert word in message
    assert "--overwrite" in message
    assert_same_run(run, finished)


@pytest.mark.slow
def test_overwrite_begins_anew(run, capsys):
    assert train(run, "--config.algorithm.name=local --config.rounds=1 --overwrite") == 0
    assert [row["round"] for row in read(run / "metrics.jsonl")] == [1]
    summary = read(run / "summary.json")
    assert (summary["algorithm"], summary["rounds"]) == ("local", 1)
    assert summary["teacher"] is None and summary["teacher_queries"] == 0
    assert summary["bytes_up_per_round"] == summary["bytes_down_per_round"] == 0
    assert summary["evaluated"] == {"small": ["personal"], "large": ["large"]}
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rounds", "all", ["config.json", "config.rounds"]),
        ("roundz", 3, ["config.json", "config.roundz"]),
        ("learning_rate", 0.5, ["config.json", "edited by hand"]),
    ],
)
def test_a_config_edited_by_hand_is_refused(run, capsys, key, value, words):
    """One that is still valid too: the checkpoints know the one that they belong to."""
    path = run / "config.json"
    path.write_text(json.dumps(read(path) | {key: value}))
    message = refusal(capsys, fedhelp(f"evaluate --workdir={run}"))
    for word in words:
        assert word in message
    message = refusal(capsys, train(run))
    assert "config.json" in message or "learning_rate: 0.5 -> 0.001" in message
    if key == "learning_rate":
        assert "edited by hand" in refusal(capsys, train(run, "--config.learning_rate=0.5"))


@pytest.mark.slow
def test_a_run_goes_on_with_the_mapping_that_it_was_started_with(tmp_path, caplog):
    """On as many devices, of those that there are, and vectorised alike; evaluate takes any."""
    workdir = tmp_path / "run"
    own = "--config.rounds=2 --config.algorithm.name=fedavg"
    assert (
        train(workdir, f"{own} --config.mapping.cpu_devices=1 --config.mapping.chunk_size=3") == 0
    )
    before = read(workdir / "summary.json")
    assert (before["program"]["devices"], before["program"]["chunk_size"]) == (1, 3)
    assert read(workdir / "provenance.json")["program"] == before["program"]
    caplog.clear()
    other = "--config.mapping.cpu_devices=2 --config.mapping.chunk_size=1"
    assert train(workdir, f"{own} {other}") == 0
    for name, kept, asked in (("cpu_devices", 1, 2), ("chunk_size", 3, 1)):
        assert f"going on with mapping.{name} = {kept}, with which" in caplog.text
        assert f"and not {asked}" in caplog.text
    assert without_times(read(workdir / "summary.json")) == without_times(before)

    assert fedhelp(f"evaluate --workdir={workdir} {other}") == 0
    after = read(workdir / "summary.json")
    assert after["program"] == before["program"]
    assert after["measured_by"] | {"devices": 1, "chunk_size": 3} == before["measured_by"]
    assert after["measured_by"]["devices"] == min(2, jax.device_count())
    assert after["small_mean"] == pytest.approx(before["small_mean"])


@pytest.mark.parametrize(
    ("program", "asked", "kept", "said"),
    [
        (("gpu", 4, 0), (None, None, 0), (None, 0, 0), ()),
        (("gpu", 1, 0), (None, 2, 0), (None, 0, 0), ("chunk_size = 0",)),
        (("cpu", 4, 1), (None, None, 0), (4, 1, 0), ("cpu_devices = 4", "not 2")),
        (("cpu", 2, 1), (None, None, 0), (2, 1, 0), ()),
    ],
)
def test_the_mapping_of_a_run_is_known_before_jax_starts(
    tmp_path, caplog, program, asked, kept, said
):
    """On a machine whose CPU would be two devices."""
    config = dataclasses.replace(
        config_lib.validate(config_lib.default_config()), mapping=MappingConfig(*asked)
    )
    names = "platform", "devices", "chunk_size"
    recorded = {
        "program": dict(zip(names, program, strict=True)),
        "sources": {"data": {"sha256": "0"}},
    }
    identity.write_provenance(tmp_path, recorded)
    assert identity.as_started(config, tmp_path, 2) == config  # nothing is saved yet
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    found = identity.as_started(config, tmp_path, 2)
    assert found.mapping == MappingConfig(*kept)
    assert config_lib.from_dict(config_lib.to_dict(found)) == found
    assert len(caplog.records) == bool(said)
    for word in said:
        assert word in caplog.text
    (tmp_path / "provenance.json").write_text("{}")
    with pytest.raises(UserError, match="provenance.json: cannot be used .* edited by hand"):
        identity.as_started(config, tmp_path, 2)


@pytest.mark.slow
def test_a_run_of_another_back_end_is_only_evaluated(run, finished, capsys, monkeypatch):
    ours = identity.program
    monkeypatch.setattr(identity, "program", lambda run: ours(run) | {"platform": "tpu"})
    message = refusal(capsys, train(run))
    assert "'platform': 'cpu'" in message and "'tpu'" in message and "same bits" in message
    assert fedhelp(f"evaluate --workdir={run}") == 0
    assert read(run / "summary.json")["program"] == read(finished / "summary.json")["program"]


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_told(run, capsys, monkeypatch):
    """Its checkpoints do not say what was read."""
    monkeypatch.setattr(identity, "of_checkpoint", lambda run: {"config_sha256": "0"})
    assert train(run, "--overwrite --config.rounds=1 --config.algorithm.name=local") == 0
    monkeypatch.undo()
    assert "an earlier version" in refusal(capsys, fedhelp(f"evaluate --workdir={run}"))


# --- more rounds ---


@pytest.mark.slow
def test_more_rounds_than_before_end_as_if_they_had_been_asked_for_at_once(
    finished, tmp_path, capsys, caplog
):
    workdir = tmp_path / "run"
    assert train(workdir, "--config.rounds=3") == 0
    assert train(workdir) == 0
    assert f"going on after round 3 of {ROUNDS}" in caplog.text
    assert_same_run(workdir, finished)
    message = refusal(capsys, train(workdir, "--config.rounds=5"))
    assert f"config.rounds = 5, but the run in {workdir} has done 6" in message
    assert_same_run(workdir, finished)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"learning_rate_schedule": "cosine"}, "learning_rate_schedule = 'cosine'"),
        ({"algorithm.name": "fedkd"}, "the schedule of fedkd"),
        ({"algorithm.name": "fedkd", "algorithm.energy_start": 0.98}, ""),
        ({}, ""),
    ],
)
def test_other_rounds_are_refused_where_a_schedule_depends_on_them(settings, word):
    config = get_config()
    config.update_from_flattened_dict(settings)
    before = config_lib.validate(config)
    after = dataclasses.replace(before, rounds=9)
    same = identity.identity_sha256(before) == identity.identity_sha256(after)
    if word:
        with pytest.raises(UserError, match="rounds: 6 -> 9; .* depends on the number of") as error:
            identity.refuse_other_settings(before, after, "--workdir=x")
        assert word in str(error.value) and not same
    else:
        identity.refuse_other_settings(before, after, "--workdir=x")
        assert same


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_each_method_says_whether_it_has_a_schedule_over_rounds(name, monkeypatch):
    """By the program of a round: two numbers of rounds make two only where there is one."""
    config = get_config()
    config.algorithm.name = name
    config.model.large = "resnet20" if name in ("fedproto", "fedgh") else "resnet32"
    settings = config_lib.validate(config)
    loaded = experiment.load(settings)

    def program(rounds):
        asked = dataclasses.replace(settings, rounds=rounds)
        phases = experiment.make_phases(asked, loaded, vectorize.make_mapping(1, 1))
        arrays = federation_arrays(loaded.federation)
        key = jax.random.key(0)
        state = jax.eval_shape(phases.init, key, arrays)
        return str(jax.make_jaxpr(phases.round)(state, key, jnp.int32(0), arrays))

    method = ALGORITHMS[name]
    differs = re.sub(r"0x[0-9a-f]+", "", program(6)) != re.sub(r"0x[0-9a-f]+", "", program(9))
    assert method.schedules(settings.algorithm.settings) == differs


# --- what was read ---


def write_images(path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = {"train": 40, "val": 10, "test": 20}
    arrays = {}
    for split, n in sizes.items():
        arrays[f"{split}_images"] = draw.integers(0, 255, (n, 8, 8)).astype(np.uint8)
        arrays[f"{split}_labels"] = draw.integers(0, 2, (n, 1)).astype(np.uint8)
    np.savez(path, **arrays)


@pytest.mark.slow
def test_other_data_at_the_same_path_are_refused_and_the_same_elsewhere_welcome(tmp_path, capsys):
    workdir, data, moved = tmp_path / "run", tmp_path / "data.npz", tmp_path / "b" / "data.npz"
    moved.parent.mkdir()
    write_images(data, 0)
    write_images(moved, 0)

    def again(path: Path) -> str:
        return (
            f"--config.data.name=medmnist --config.data.path={path} --config.rounds=2 "
            "--config.data.split_by=iid --config.data.num_clients=3 --config.algorithm.name=local"
        )

    assert train(workdir, again(data)) == 0
    before = read(workdir / "summary.json")
    source = read(workdir / "provenance.json")["sources"]["data"]
    assert (source["path"], source["examples"]) == (str(data), 70)
    assert source["bytes"] == data.stat().st_size

    write_images(data, 1)
    kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    evaluate = f"evaluate --workdir={workdir}"
    for command in (train_command(workdir, again(data)), evaluate):
        message = refusal(capsys, fedhelp(command))
        for word in (f"data at {data}", "other content", source["sha256"][:16], str(workdir)):
            assert word in message
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == kept

    assert fedhelp(f"{evaluate} --config.data.path={moved}") == 0
    assert without_times(read(workdir / "summary.json")) == without_times(before)
    assert read(workdir / "config.json")["data"]["path"] == str(data)
    assert train(workdir, again(moved)) == 0
    assert read(workdir / "config.json")["data"]["path"] == str(moved)
    assert without_times(read(workdir / "summary.json")) == without_times(before)


# --- networks as they are ---


@pytest.mark.slow
def test_residual_networks_run_to_the_end_and_can_be_evaluated(tmp_path, monkeypatch):
    """In a federation without large clients."""
    for name in ("resnet20", "resnet32"):
        monkeypatch.delitem(MODELS._found, name)
    rest = "--config.rounds=2 --config.data.fractions='(0.7,0.3)' --config.roles.top_n=0"
    workdir = tmp_path / "run"
    assert train(workdir, rest) == 0
    rows = read(workdir / "metrics.jsonl")
    assert [row["round"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[1]["compile_s"] == 0
    before = read(workdir / "summary.json")
    assert 0 <= before["worst_small"] <= before["small_mean"] <= 1
    assert before["large_mean"] is None and before["gap"] is None
    assert before["evaluated"] == {"small": ["personal", "global"]}
    # 269,722 parameters with a head of 10 classes, here of 8; 688 means and variances.
    assert before["bytes_up_per_round"] == 2 * 4 * (269_722 - 2 * 65 + 2 * 688)
    assert fedhelp(f"evaluate --workdir={workdir}") == 0
    assert without_times(read(workdir / "summary.json")) == without_times(before)


@pytest.mark.slow
def test_a_run_in_bfloat16_is_near_one_in_float32():
    """Two clients at once on each device."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        settings = get_config()
        settings.model.small, settings.model.large = "cnn_small", "cnn_large"
        settings.model.compute_dtype, settings.mapping.chunk_size = dtype, 2
        simulation = build_experiment(config_lib.validate(settings)).simulation
        state = simulation.init()
        kinds = jax.tree.map(lambda leaf: leaf.dtype, state)
        losses[dtype] = []
        for round in range(3):
            state, info = simulation.round(state, round)
            losses[dtype] += [*info.info["small"]["loss"], *info.info["large"]["loss"]]
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == kinds
        assert jnp.bfloat16 not in jax.tree.leaves(kinds)
        losses[dtype] += [*simulation.evaluate(state, "test")["small"]["personal"]["loss"]]
    assert np.isfinite(losses["bfloat16"]).all()
    assert not np.array_equal(losses["bfloat16"], losses["float32"])
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)


def test_however_rare_evaluations_are_a_dispatch_takes_a_bounded_number_of_rounds():
    settings = get_config()
    settings.rounds, settings.evaluate_every, settings.checkpoint_every = 4500, 2500, 2**31 - 1
    config, stops = config_lib.validate(settings), [0]
    while stops[-1] < config.rounds:
        stops.append(runner._next_stop(config, stops[-1]))
    assert stops == [0, 1000, 2000, 2500, 3500, 4500]
    assert experiment.rounds_at_once(config) == 1000


@pytest.mark.slow
def test_a_cosine_schedule_gives_each_round_a_learning_rate_of_its_own():
    """(1 + cos(pi r / 3)) / 2 is 1, 0.75 and 0.25, also for the server's rate of FedGH."""
    rates = ("learning_rate", "algorithm.server_learning_rate")
    settings = get_config()
    settings.algorithm.name = "fedgh"
    settings.model.large = settings.model.small
    config = config_lib.validate(settings)
    with jax.enable_x64(True):
        cosine = dataclasses.replace(config, rounds=3, learning_rate_schedule="cosine")
        simulation = build_experiment(cosine).simulation
        state = simulation.init()
        expected = on_host(state)
        for round, factor in enumerate((1.0, 0.75, 0.25)):
            values = {key: factor * numbers(config)[key] for key in rates}
            constant = with_numbers(config, values)
            reference = build_experiment(constant).simulation
            expected, _ = reference.round(
                jax.device_put(expected, reference.mapping.replicated), round
            )
            state, _ = simulation.round(state, round)
            expected = on_host(expected)
            assert_trees_close(on_host(state), expected)
