"""A sweep is the same runs, in one program: equal results, one compilation, nothing run twice."""

import csv
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import CONFIG, fedhelp, refusal
from helpers import FROM_IMAGES, use_tiny_networks
from jax.interpreters.partial_eval import dce_jaxpr

from fedhelp_jax.algorithms import ALGORITHMS, settings_of
from fedhelp_jax.core.compilation import compile_totals
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments import sweep as sweeps
from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.experiments.experiment import build_experiment, load, make_phases
from fedhelp_jax.experiments.sweep import sweep
from fedhelp_jax.experiments.sweep_blocks import Run, blocks, numbers, with_numbers
from fedhelp_jax.experiments.unused import needed_for
from fedhelp_jax.report.summary import group_summary, headline
from fedhelp_jax.report.sweeps import best_settings
from fedhelp_jax.simulation.round import federation_arrays
from fedhelp_jax.simulation.vectorize import make_mapping

ROUNDS = 2
FINE = "loss"  # shares of a few images are equal too easily
POINTS = [(1e-3, 0.0, 0), (1e-3, 0.4, 1), (4e-3, 0.0, 1)]

pytestmark = pytest.mark.usefixtures("tiny_networks")


@pytest.fixture
def tiny_networks(monkeypatch):
    use_tiny_networks(monkeypatch)


def config_of(seed=0, **settings):
    flags = {"rounds": ROUNDS, "checkpoint_every": 1, "seed": seed, **settings}
    return read_settings(str(CONFIG), [f"--config.{k}={v}" for k, v in flags.items()])


def runs_of(points=POINTS, **settings):
    return [
        Run(
            {"learning_rate": rate, "algorithm.lambda_b": weight, "seed": seed},
            config_of(seed, learning_rate=rate, **{"algorithm.lambda_b": weight, **settings}),
        )
        for rate, weight, seed in points
    ]


def alone(config, split="validation"):
    """The same run by itself."""
    experiment = build_experiment(config)
    state = experiment.simulation.init()
    for round in range(config.rounds):
        state, _ = experiment.simulation.round(state, round)
    results = experiment.simulation.evaluate(state, split)
    return group_summary(headline(results, FINE))


@pytest.fixture
def fine_metric(monkeypatch):
    """Tables lead with the loss."""
    monkeypatch.setattr(sweeps, "headline", lambda results, metric: headline(results, FINE))


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "fine_metric")
def test_a_run_in_a_sweep_equals_the_run_alone(tmp_path):
    """Numbers and seeds, whose data and large clinic differ; vectorised and one by one."""
    runs = runs_of()
    expected = [alone(run.config) for run in runs]
    for count in (1, 2):
        rows = sweep(runs, tmp_path / str(count), runs_at_once=count, say=lambda text: None)
        for row, one in zip(rows, expected, strict=True):
            assert {k: row[k] for k in one} == pytest.approx(one, rel=1e-5)
        assert len({row["small_mean"] for row in rows}) == len(runs)


@pytest.mark.slow
def test_one_program_takes_all_numbers_and_seeds_and_nothing_is_run_twice(tmp_path):
    """Whatever is finished is not run again; a value more, and only its runs are made."""
    said: list[str] = []
    sweep(runs_of(), tmp_path, say=said.append)
    assert [line for line in said if line.startswith("program")][0].startswith(
        "program 1 of 1: 3 runs"
    )
    before = (tmp_path / "runs.jsonl").read_text()
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"fingerprint": "cut o')  # killed in the writing

    compiled = compile_totals().programs
    said.clear()
    table = sweep(runs_of(), tmp_path, say=said.append)
    assert said == ["3 of 3 runs are finished"]
    assert compile_totals().programs == compiled
    assert (tmp_path / "runs.jsonl").read_text() == before

    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [row["seed"] for row in rows] == ["0", "1", "1"]
    assert [float(row["small_mean"]) for row in rows] == [row["small_mean"] for row in table]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "learning_rate.png",
        "algorithm.lambda_b.png",
        "seed.png",
    }

    more = [*POINTS, (1e-3, 0.2, 0)]
    sweep(runs_of(more), tmp_path, say=said.append)
    assert "program 1 of 1: 1 runs, 1 at a time" in " ".join(said)
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(lines) == len(more) and lines[:3] == [json.loads(x) for x in before.splitlines()]


@pytest.mark.slow
def test_runs_are_not_added_to_those_of_other_data(tmp_path):
    """Nor to those of a version that did not record them, nor are equal runs swept over."""
    settings = {"algorithm.name": "local", "rounds": 1}
    runs = [Run({"seed": 0}, config_of(**settings))]
    sweep(runs, tmp_path, say=lambda text: None)
    (line,) = [json.loads(text) for text in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert line["sources"]["data"]["sha256"]
    other = {"sources": {"data": {"sha256": "0" * 64}}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line | other) + "\n")
    with pytest.raises(UserError, match="data: other content .* 0{16}, now"):
        sweep(runs, tmp_path, say=lambda text: None)
    del line["sources"]
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="an earlier version"):
        sweep(runs, tmp_path, say=lambda text: None)
    again = [*runs, Run({"seed": 0}, config_of(**settings, **{"mapping.chunk_size": 2}))]
    with pytest.raises(UserError, match="differ in nothing that makes another run"):
        sweep(again, tmp_path, say=lambda text: None)


def test_as_many_programs_as_shapes(tmp_path):
    """Runs of two batch sizes make two blocks; the second chunk of one compiles nothing."""
    points = [(1e-3, 0.0, 0), (2e-3, 0.0, 0), (3e-3, 0.0, 0)]
    runs = runs_of(points) + runs_of(points, batch_size=8)
    found = blocks(runs)
    assert [len(block.runs) for block in found] == [3, 3]
    assert [block.traced for block in found] == [("learning_rate",)] * 2
    program = sweeps.Program(found[0], "validation")
    assert program.slots == min(2, jax.device_count())
    results = program.results()
    next(results)
    compiled = compile_totals().programs
    assert len(list(results)) == -(-3 // program.slots) - 1
    assert compile_totals().programs == compiled


@pytest.mark.slow
def test_what_does_not_fit_the_memory_is_refused_before_it_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "free_host_bytes", lambda: 1000)
    with pytest.raises(UserError, match="GiB a device, but 0.00 GiB are free: lower --runs"):
        sweep(runs_of(), tmp_path, say=lambda text: None)
    assert not (tmp_path / "runs.jsonl").exists()


def phases_of(config):
    """The phases of a run on one device, and its arrays."""
    loaded = load(config)
    phases = make_phases(config, loaded, make_mapping(1, 1))
    return phases, federation_arrays(loaded.federation)


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_IMAGES)
@pytest.mark.parametrize("server", ["none", "adam", "sgd"])
def test_every_number_of_every_method_can_be_traced(name, server):
    """So that a sweep over it is one program; and each that has an effect is read, no other."""
    large = {"model.large": "resnet20"} if name in ("fedproto", "fedgh") else {}
    config = config_of(**{"algorithm.name": name, "server.optimizer": server, **large})
    loaded = load(config)
    arrays = federation_arrays(loaded.federation)
    swept = numbers(config)
    own = settings_of(ALGORITHMS[name].settings())
    assert {f"algorithm.{k}" for k, v in own.items() if isinstance(v, float)} <= set(swept)

    def one_round(values):
        phases = make_phases(with_numbers(config, values), loaded, make_mapping(1, 1))
        key = jax.random.key(0)
        state = phases.init(key, arrays)
        return phases.round(state, key, jnp.int32(0), arrays)[0], state

    values = {k: jnp.float32(v) for k, v in swept.items()}
    traced, (after, before) = jax.make_jaxpr(one_round, return_shape=True)(values)
    read = dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals))[1]
    assert dict(zip(sorted(swept), read, strict=True)) == {
        key: not needed_for(config, key) for key in swept
    }
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), before
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FROM_IMAGES) - {"fedproto", "fedgh"}))
def test_a_method_that_ignores_the_large_network_does_not_use_it(name):
    """The other two need features of one width, so use both."""

    def program(large):
        config = config_of(**{"algorithm.name": name, "model.large": large})
        phases, arrays = phases_of(config)

        def one_round(key):
            return phases.round(phases.init(key, arrays), key, jnp.int32(0), arrays)[0]

        # Functions are printed with their addresses.
        return re.sub(r" at 0x\w+", "", str(jax.make_jaxpr(one_round)(jax.random.key(0))))

    same = program("resnet20") == program("resnet32")
    assert same == ALGORITHMS[name].ignores("model.large")


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_a_method_that_ignores_the_clients_weights_does_not_use_them(name):
    own = {"algorithm.server_steps": 1} if name == "feddf" else {}
    config = config_of(**{"algorithm.name": name, "model.large": "resnet20", **own})
    phases, arrays = phases_of(config)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    state, round = phases.init(key, arrays), jnp.int32(0)
    trained = {}
    for role, states in state.clients.items():
        shapes = jax.eval_shape(
            lambda role=role, states=states: phases.train(
                role, states, state.server, key, round, arrays
            )
        )
        drawn = jax.tree.map(
            lambda leaf: jnp.asarray(rng.uniform(1, 2, leaf.shape), leaf.dtype), shapes.upload
        )
        slot = jnp.arange(phases.num_slots(role))
        trained[role] = (states, drawn, jnp.ones(shapes.weight.shape), slot)
    # Sums over a device's clients are of one role, so roles differ as well as clients.
    uneven = {
        role: (*rest[:2], 1 + number + jnp.arange(len(rest[2]), dtype=float), rest[3])
        for number, (role, rest) in enumerate(trained.items())
    }
    servers = [phases.aggregate(state, t, key, round, arrays).server for t in (trained, uneven)]
    first, second = (jax.tree.leaves(server) for server in servers)
    same = all(np.allclose(a, b, rtol=1e-6) for a, b in zip(first, second, strict=True))
    assert same == ALGORITHMS[name].ignores("client_weights")


@pytest.mark.slow
def test_the_command_sweeps(tmp_path, capsys):
    devices = f"--config.mapping.cpu_devices={jax.device_count()} --config.rounds=1"
    command = (
        f"sweep --config={CONFIG} --workdir={tmp_path} {devices} --config.algorithm.name=fedavg "
        "--sweep=learning_rate=1e-3,1e-2 --sweep=client_weights=uniform,examples --seeds=0:2"
    )
    assert fedhelp(command) == 0
    assert "written: " in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [tuple(row.values())[:3] for row in rows] == [
        (rate, weights, seed)
        for rate in ("0.001", "0.01")
        for weights in ("uniform", "examples")
        for seed in ("0", "1")
    ]
    assert {row["split"] for row in rows} == {"validation"}


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("", "--sweep is missing"),
        ("--sweep=learning_rate", "must be KEY=VALUE,VALUE"),
        ("--sweep=learning_rat=1,2", "--config.learning_rat is not a known flag; did you mean"),
        ("--sweep=learning_rate=1,fast", "config.learning_rate = 'fast' must be a finite number"),
        ("--sweep=learning_rate=0.1,0", "config.learning_rate = 0 must be more than 0"),
        (
            "--sweep=server.beta2=0.9,0.95",
            "server.beta2 changes nothing in this run: it is for ser",
        ),
        (
            "--config.algorithm.name=fedavg --sweep=teacher.accuracy=0.5,0.6",
            "config.teacher.accuracy changes nothing in this run: it is for methods other than",
        ),
        ("--sweep=seed=1,2", "seeds have a flag of their own"),
        ("--seeds=4:2", "--seeds=4:2: must be FIRST:END"),
        ("--seeds=0:10000000000000000000000", "N,N,..., at most 100,000"),
        ("--seeds=1,1", "--seeds=1,1: must be FIRST:END"),
        ("--seeds=x", "--seeds=x: must be FIRST:END"),
    ],
)
def test_bad_sweeps_are_one_line_and_exit_code_2(tmp_path, capsys, rest, words):
    code = fedhelp(f"sweep --config={CONFIG} --workdir={tmp_path} {rest}")
    assert words in refusal(capsys, code)


def test_the_best_settings_come_first_and_seeds_are_averaged():
    def row(rate, seed, small, large):
        means = {"small_mean": small, "large_mean": large, "worst_small": small, "gap": None}
        return {"learning_rate": rate, "seed": seed, "split": "test", "metric": "auroc", **means}

    table = [row(0.1, 0, 0.5, 0.5), row(0.1, 1, 0.7, 0.9), row(0.2, 0, 0.9, 0.9)]
    table += [row(0.3, 0, None, None)]
    grid = best_settings(table, ["learning_rate", "seed"])
    assert grid.title == "auroc on test images"
    assert [[cell.text for cell in cells] for cells in grid.rows] == [
        ["0.2", "0.900", "0.900", "0.900", "-"],
        ["0.1", "0.600 ± 0.141", "0.700 ± 0.283", "0.600 ± 0.141", "-"],
        ["0.3", "-", "-", "-", "-"],
    ]
    many = [row(i, 0, i / 20, 0.5) for i in range(12)]
    grid = best_settings(many, ["learning_rate"])
    assert grid.rows[0][0].text == "11" and "2 more settings are in runs.csv." in grid.notes
