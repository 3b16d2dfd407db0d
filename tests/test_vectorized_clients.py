"""As many clients are vectorised at a time as fit in the memory of a device."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import pytest
from commands import CONFIG, fedhelp, read, train
from helpers import (
    PUBLIC,
    assert_trees_close,
    build,
    on_host,
    refusal,
    simulate,
    tiny_federation,
    tiny_public,
    tiny_setup,
    use_tiny_networks,
)
from marks import two_devices

import fedhelp_jax as fh
from fedhelp_jax.core.compilation import Program, compile_totals
from fedhelp_jax.experiments import experiment
from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.simulation import memory, simulation, vectorize

CLIENTS = tuple((f"c{i}", 4 + i % 5, 2, 2) for i in range(24))
ROUNDS = 2


class Case(NamedTuple):
    """How a run is executed, and how many programs it compiles that vectorise no clients."""

    options: dict[str, Any]
    others: int


CASES = [
    pytest.param(Case({}, 1), id="one device"),
    pytest.param(Case({"num_devices": 2}, 1), id="two devices", marks=two_devices),
    pytest.param(Case({"num_devices": 2, "private": True}, 3), id="private", marks=[two_devices]),
    pytest.param(Case({"rounds_at_once": ROUNDS}, 0), id="several rounds"),
    pytest.param(Case({"max_device_bytes": 200_000}, 3), id="streamed"),
    pytest.param(Case({"participation_rate": 0.5}, 1), id="half of the clients"),
]


def make(options, chunk_size=0):
    """FedHelp over clients of unequal sizes, as on an accelerator."""
    on_host = "max_device_bytes" in options or "private" in options
    data = tiny_federation(CLIENTS, top_n=4, public=tiny_public(), on_host=on_host)
    method = build("fedhelp", tiny_setup(public=PUBLIC), kd_warmup_rounds=0)
    return simulate(method, data, chunk_size=chunk_size, **options)


def outcome(rounds):
    state = rounds.init()
    state, infos = rounds.rounds(state, 0, ROUNDS)
    losses = [
        {
            g.role: info.info[g.role]["loss"][: rounds.phases.num_participants(g.role)]
            for g in rounds.groups
        }
        for info in infos
    ]
    server = on_host(state.server)
    return server, on_host(losses), rounds.evaluate(state, "test")


def most(rounds):
    return max(need.total for need in memory.needs_of(rounds))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[2:-1])
@pytest.mark.usefixtures("float64")
def test_clients_are_divided_until_they_fit_and_nothing_else_changes(case, caplog):
    whole = make(case.options)
    needed = most(whole)
    limit = 0.6 * needed
    size = round(limit / 0.9)
    fitted = memory.fit(whole, memory=size)
    chunk = fitted.mapping.chunk_size
    assert 0 < chunk < 20 // whole.mapping.num_devices
    assert most(fitted) <= limit
    # Chunks are equal, and the guess is on the safe side, so up to about twice as many could fit.
    assert most(whole.with_chunk_size(5 * chunk // 2)) > limit
    (record,) = caplog.records
    said = record.getMessage()
    assert f"{chunk} of {20 // whole.mapping.num_devices} small" in said
    assert ("on each device" in said) == (whole.mapping.num_devices > 1)
    assert_trees_close(outcome(fitted), outcome(whole))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[2:4])
def test_what_fits_is_left_as_it_is_and_compiled_once(case, caplog):
    rounds = make(case.options)
    state = rounds.init()
    before = compile_totals().programs
    assert memory.fit(rounds, memory=2**40) is rounds
    assert compile_totals().programs > before
    assert not caplog.records
    before = compile_totals().programs
    state, _ = rounds.rounds(state, 0, ROUNDS)
    for split in ("validation", "test"):
        rounds.evaluate(state, split)
    assert compile_totals().programs == before + case.others


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_program_needs_more_than_is_counted(case):
    """By the compiler's whole account of it, with its arguments instead of what is held."""
    rounds, least = make(case.options), []
    needs = memory.needs_of(rounds)
    for need, call in zip(needs, rounds.calls(), strict=True):
        found = call.program.lower(*call.args).compile().memory_analysis()
        counted = found.argument_size_in_bytes + found.output_size_in_bytes
        assert need.temporary == found.temp_size_in_bytes > 0
        assert need.total >= counted + found.temp_size_in_bytes - found.alias_size_in_bytes
        least.append(counted)
    assert max(need.fixed for need in needs) < 3 * max(least)  # and not far more


@pytest.mark.parametrize("case", [CASES[1], CASES[3]])
def test_what_is_compiled_ahead_is_what_runs(case):
    """In the way of CPUs, one client after the other."""
    rounds = make(case.options, chunk_size=1)
    state = rounds.init()
    before = compile_totals().programs
    rounds.compile_ahead()
    assert compile_totals().programs > before
    before = compile_totals().programs
    state, _ = rounds.rounds(state, 0, ROUNDS)
    rounds.evaluate(state, "validation")
    assert compile_totals().programs == before + case.others


def test_a_run_that_only_evaluates_compiles_only_that():
    rounds = make({})
    before = compile_totals().programs
    memory.fit(rounds, training=False, memory=2**40)
    assert compile_totals().programs == before + 2


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_number_that_was_asked_for_is_kept(chunk_size):
    rounds = make({}, chunk_size)
    assert memory.fit(rounds, memory=1) is rounds


def test_a_device_of_unknown_memory_is_taken_for_large_enough():
    rounds = make({})
    before = compile_totals().programs
    assert memory.fit(rounds) is rounds
    assert compile_totals().programs == before


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused(caplog):
    message = refusal(lambda: memory.fit(make({}), memory=40_000))
    assert message.startswith("even one client at a time takes")
    assert "participation_rate" in message
    assert not caplog.records


@pytest.mark.slow
def test_a_compiler_that_runs_out_of_memory_gets_fewer_clients(monkeypatch, caplog):
    rounds, lower, failed = make({}), Program.lower, []

    def failing(program, *args):
        if not failed:
            failed.append(program)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return lower(program, *args)

    monkeypatch.setattr(Program, "lower", failing)
    assert memory.fit(rounds, memory=2**40).mapping.chunk_size == 10
    assert "10 of 20 small clients" in caplog.text
    assert "all at once would exceed 1,024.00 GiB" in caplog.text


@pytest.mark.parametrize(
    ("largest", "clients", "expected"),
    [
        (9, [20, 4], 7),
        (19, [20, 4], 10),
        (3, [20, 4], 2),
        (999, [10_000], 910),
        (700, [10_000, 1000], 500),
        (1, [20, 4], 1),
    ],
)
def test_chunks_are_equal(largest, clients, expected):
    assert memory._even(largest, clients) == expected


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """All clients at once by default, on a device with 60 % of the memory that they need."""
    use_tiny_networks(monkeypatch)

    def mapping(chunk_size=None, *args, **kwargs):
        chunk_size = 0 if chunk_size is None else chunk_size
        return vectorize.make_mapping(chunk_size, *args, **kwargs)

    for module in (experiment, simulation):
        monkeypatch.setattr(module, "make_mapping", mapping)

    def small(rounds):
        size = round(0.6 * most(rounds) / 0.9)
        monkeypatch.setattr(memory, "device_bytes", lambda device: size)

    return small


@pytest.mark.slow
def test_the_command_line_tells_how_many(tmp_path, caplog, as_on_an_accelerator):
    """A stopped run goes on with as many as before, and so does its evaluation."""
    rest = (
        "--config.mapping.cpu_devices=1 --config.evaluate_every=2 --config.algorithm.name=fedavg "
        "--config.data.fractions=(.2,.1,.1,.1,.1,.1,.1,.1,.1)"
    )
    settings = read_settings(str(CONFIG), rest.split())
    as_on_an_accelerator(experiment.build_experiment(settings).simulation)
    caplog.set_level(logging.WARNING)
    assert train(tmp_path / "fitted", f"{rest} --config.rounds=2") == 0
    assert "of 8 small clients are vectorised at a time, because all at once" in caplog.text
    chunk = read(tmp_path / "fitted" / "provenance.json")["program"]["chunk_size"]
    assert f"{chunk} of 8 small clients" in caplog.text
    assert 0 < chunk < 8
    first, last = read(tmp_path / "fitted" / "metrics.jsonl")
    assert first["wall_s"] > first["compile_s"] > 0
    caplog.clear()
    assert train(tmp_path / "fitted", f"{rest} --config.rounds=4") == 0
    assert "vectorised" not in caplog.text
    assert read(tmp_path / "fitted" / "summary.json")["program"]["chunk_size"] == chunk
    assert fedhelp(f"evaluate --workdir={tmp_path / 'fitted'}") == 0

    caplog.clear()
    every = f"{rest} --config.rounds=2 --config.mapping.chunk_size=0"
    assert train(tmp_path / "all", every) == 0
    assert "vectorised" not in caplog.text
    assert read(tmp_path / "all" / "provenance.json")["program"]["chunk_size"] == 0
    ours, theirs = (read(tmp_path / name / "metrics.jsonl")[0] for name in ("fitted", "all"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert last["round"] == 2


@pytest.mark.slow
def test_a_simulation_from_python_fits_too(caplog, as_on_an_accelerator):
    data = fh.data.load("phantoms", num_examples=120, image_size=8)
    network = functools.partial(fh.models.cnn, (4, 8), data.num_classes)
    algorithm = fh.algorithms.fedavg(small=network(), large=network())
    whole = fh.Simulation(algorithm, data, large=0, num_devices=1, chunk_size=0)
    as_on_an_accelerator(whole._compiled)
    state = whole.init(jax.random.key(0))
    assert not caplog.records
    sim = fh.Simulation(algorithm, data, large=0, num_devices=1)
    assert not caplog.records
    state = sim.init(jax.random.key(0))
    assert "small clients are vectorised at a time" in caplog.text
    assert sim._compiled.mapping.chunk_size > 0
    before = compile_totals().programs
    state, _ = sim.step(state)
    sim.evaluate(state)
    assert compile_totals().programs == before + 1  # the server's
