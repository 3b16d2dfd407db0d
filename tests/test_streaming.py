"""Private images that come from the host in parts change nothing of what is computed."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import CONFIG, fedhelp, read, refusal, train
from compiled_faster import AS_FOR_USERS
from helpers import (
    ANSWERS,
    PUBLIC,
    SIZE,
    assert_trees_close,
    assert_trees_equal,
    build,
    on_host,
    simulate,
    tiny_federation,
    tiny_public,
    tiny_setup,
    use_tiny_networks,
)
from helpers import refusal as refused
from marks import two_devices

from fedhelp_jax.core import compilation
from fedhelp_jax.core.compilation import compile_totals
from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.experiments.experiment import build_experiment
from fedhelp_jax.simulation import streaming

ROUNDS = 2
MASK_CONFIG = Path(__file__).parent / "mask_config.py"
EXAMPLE = 3 * SIZE**2 + 4  # bytes of an image and its label
LARGEST = 13
# (name, train, validation, test): in parts of LARGEST examples one, two or three clients each.
CLIENTS = (
    ("a", 5, 1, 4),
    ("b", 2, 0, 1),
    ("c", 5, 2, 3),
    ("d", 9, 1, 2),
    ("e", 1, 0, 1),
    ("f", 5, 1, 2),
    ("g", LARGEST, 3, 5),
    ("h", 6, 1, 1),
    ("i", 8, 0, 2),
)
POOL_BYTES = 2 * LARGEST * EXAMPLE


@functools.cache
def federation(with_public=False, top_n=3):
    public = tiny_public() if with_public else None
    return tiny_federation(CLIENTS, top_n=top_n, public=public, on_host=True)


def make(name, max_device_bytes=0, *, top_n=3, **options):
    """A method over the clients."""
    uses_public = name == "fedhelp"
    spec = PUBLIC._replace(num_answers=ANSWERS) if uses_public else None
    data = federation(uses_public, top_n)
    settings = {"kd_warmup_rounds": 0, "margin": 0.1} if name == "fedhelp" else {}
    method = build(name, tiny_setup(public=spec), **settings)
    return simulate(method, data, max_device_bytes=max_device_bytes, eval_batch_size=2, **options)


def outcome(simulation):
    """All that comes out of a run: the last state, reports by client, metrics."""
    state, reports = simulation.init(), []
    for round in range(ROUNDS):
        state, info = simulation.round(state, round)
        for group in simulation.groups:
            slot = np.asarray(info.participants[group.role])
            reports.append((slot, on_host(info.info[group.role])))
    metrics = {split: simulation.evaluate(state, split) for split in ("validation", "test")}
    return on_host(state), reports, metrics


class Watched:
    """How many parts came, and the most private bytes that lay on a device."""

    def __init__(self, patch):
        self.parts, self.most, self.largest = 0, 0, 0
        known = {id(array) for array in jax.live_arrays()}
        on_devices = streaming.HostFeeder.on_devices

        def watched(feed, part, pool):
            placed = on_devices(feed, part, pool)
            self.parts += 1
            images = [
                int(np.prod(array.sharding.shard_shape(array.shape)))
                for array in jax.live_arrays()
                if array.dtype == np.uint8 and id(array) not in known
            ]
            self.most = max(self.most, sum(images))
            self.largest = max(self.largest, *images)
            return placed

        patch.setattr(streaming.HostFeeder, "on_devices", watched)


def case(name, chunk_size, num_devices, participation, **options):
    about = f"{name}-{chunk_size}-{num_devices}-{participation}" + "".join(options)
    options |= {"chunk_size": chunk_size, "num_devices": num_devices}
    skipped = two_devices if num_devices == 2 else ()
    options |= {"name": name, "participation_rate": participation}
    return pytest.param(options, marks=skipped, id=about)


# --- equality ---


@pytest.fixture
def compiled_as_for_users(monkeypatch):
    """Compiles the package's programs with the fusions of users."""
    options = compilation.compiler_options
    monkeypatch.setattr(
        compilation, "compiler_options", lambda *a, **kw: options(*a, **kw) | AS_FOR_USERS
    )


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "compiled_as_for_users")
@pytest.mark.parametrize(
    "options",
    [
        case("fedavg", 1, 1, 0.6),
        case("fedavg", 2, 2, 0.6, client_weights="examples"),
        case("fedhelp", 1, 2, 0.6),
        case("scaffold", 1, 2, 0.6),
        case("per_fedavg", 1, 2, 0.6),  # which adapts to training images when it is measured
    ],
)
def test_images_in_parts_change_nothing(options, monkeypatch):
    """Where clients run one by one, not a bit."""
    expected = outcome(make(**options))
    watched = Watched(monkeypatch)
    max_device_bytes = 2 * POOL_BYTES if options["name"] == "per_fedavg" else POOL_BYTES
    got = outcome(make(max_device_bytes=max_device_bytes, **options))
    assert watched.parts >= 3 * ROUNDS
    assert_trees_close(got, expected, 1e-12)
    if options["chunk_size"] == 1:
        assert_trees_equal(got, expected)


@functools.cache
def masks(max_device_bytes):
    """A run on phantoms with masks: its settings, and it."""
    flags = [
        "algorithm.name=per_fedavg",
        "evaluate_every=1",
        f"mapping.max_device_bytes={max_device_bytes}",
    ]
    config = read_settings(f"{MASK_CONFIG}:2d", [f"--config.{flag}" for flag in flags])
    return build_experiment(config).simulation


@pytest.mark.slow
def test_predictions_of_masks_are_the_same():
    """Of an adapting method, whose training images come along; a float32 run's states too."""
    whole, parts = masks(0), masks(32_000)
    outcomes = []
    for simulation in (whole, parts):
        state = simulation.init()
        state, _ = simulation.round(state, 0)
        predicted = [
            simulation.predictions(state, group, row, split)
            for group in simulation.groups
            for row in range(len(group.names))
            for split in ("train", "test")
        ]
        outcomes.append((on_host(state), predicted, simulation.evaluate(state, "test")))
    assert_trees_close(outcomes[1], outcomes[0], 1e-5)


# --- what lies on the devices, and what compiles ---


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, pytest.param(2, marks=two_devices)])
def test_no_more_than_the_bound_lies_on_a_device(monkeypatch, num_devices):
    """The host has all images; a part is there while another one comes, and nothing else."""
    simulation = make("fedhelp", POOL_BYTES, num_devices=num_devices)
    watched = Watched(monkeypatch)
    outcome(simulation)
    pool = federation(True).pool.images.nbytes
    assert pool > 2 * POOL_BYTES
    assert watched.largest <= POOL_BYTES // 2
    assert POOL_BYTES // 2 < watched.most <= POOL_BYTES


def test_nothing_compiles_after_the_first_round():
    """Half of the clients, others in other rounds, in more parts or fewer; and both splits."""
    compile_totals()
    simulation = make("fedavg", POOL_BYTES, participation_rate=0.5, top_n=0)
    state, parts = simulation.init(), set()
    for round in range(8):
        compiled = compile_totals().programs
        state, info = simulation.round(state, round)
        for split in ("validation", "test", "train"):
            simulation.evaluate(state, split)
        assert round == 0 or compile_totals().programs == compiled
        slots = {role: np.asarray(slot) for role, slot in info.participants.items()}
        parts.add(sum(len(list(simulation._feed.training(r, slots[r]))) for r in slots))
    assert len(parts) > 1


def test_a_part_holds_as_many_clients_as_fit():
    """Consecutive ones, each device its own, as the table of sizes above has them."""
    small, large = federation().groups
    feed = make("fedavg", POOL_BYTES)._feed

    def rows(group):
        parts = feed.training(group.role, np.arange(len(group.names)))
        return [[group.names[i] for i in part.slot if i < len(group.names)] for part in parts]

    assert rows(small) == [["a", "b", "c"], ["e", "f", "h"]]
    assert rows(large) == [["d"], ["g"], ["i"]]


# --- in a run ---


@pytest.fixture
def tiny_networks(monkeypatch):
    use_tiny_networks(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_networks")
def test_a_run_is_the_same_and_goes_on_with_its_own_setting(tmp_path, caplog):
    rest = "--config.rounds=4 --config.algorithm.name=fedavg"
    folders = tmp_path / "whole", tmp_path / "parts"
    for folder, max_device_bytes in zip(folders, (0, 20_000), strict=True):
        assert train(folder, f"{rest} --config.mapping.max_device_bytes={max_device_bytes}") == 0
    rows = [read(folder / "metrics.jsonl") for folder in folders]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["bytes_up"] == theirs["bytes_up"]
    assert rows[1][-1]["compile_s"] == 0
    summaries = [read(folder / "summary.json")["per_client"] for folder in folders]
    assert [c["metrics"].keys() for c in summaries[0]] == [
        c["metrics"].keys() for c in summaries[1]
    ]
    assert train(folders[1], rest) == 0
    assert "going on with mapping.max_device_bytes = 20000, with which" in caplog.text
    assert read(folders[1] / "config.json")["mapping"]["max_device_bytes"] == 20_000


# --- what cannot be done, in one line ---


def test_a_client_that_does_not_fit_is_named_with_the_bytes_it_needs():
    message = refused(lambda: make("fedavg", POOL_BYTES - 1))
    assert (
        f"config.mapping.max_device_bytes = {POOL_BYTES - 1} must be at least {POOL_BYTES}"
        in message
    )
    assert f"{LARGEST} images that g needs" in message
    # Training and test images at once.
    message = refused(lambda: make("per_fedavg", POOL_BYTES))
    assert f"must be at least {2 * (LARGEST + 5) * EXAMPLE}" in message


def test_processes_that_hold_their_own_images_are_refused():
    message = refused(lambda: make("fedavg", POOL_BYTES, private=True))
    assert "config.mapping.max_device_bytes" in message and "--distributed" in message


@pytest.mark.usefixtures("tiny_networks")
def test_what_needs_all_images_at_once_is_refused(tmp_path, capsys):
    flags = "--config.mapping.max_device_bytes=20000"
    code = train(tmp_path / "run", f"{flags} --config.algorithm.name=centralized")
    message = refusal(capsys, code)
    assert "config.mapping.max_device_bytes = 20000" in message and "centralized" in message
    sweep = f"sweep --config={CONFIG} --workdir={tmp_path / 'sweep'} --sweep=learning_rate=0.1,0.2"
    assert "config.mapping.max_device_bytes must be 0" in refusal(
        capsys, fedhelp(f"{sweep} {flags}")
    )
