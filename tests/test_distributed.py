"""Many processes as one run, on this machine: what comes out, what stops them, who holds what."""

import functools
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import fedhelp, read, refusal, train, train_command
from helpers import (
    CLASSES,
    assert_trees_close,
    assert_trees_equal,
    build,
    on_host,
    run,
    simulate,
    tiny_federation,
    tiny_model,
    tiny_setup,
    use_tiny_networks,
)

from fedhelp_jax.core import distributed
from fedhelp_jax.experiments import config as config_lib
from fedhelp_jax.experiments import runner
from fedhelp_jax.experiments.checkpoint import Checkpointer
from fedhelp_jax.experiments.experiment import load, make_phases
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.vectorize import make_mapping

pytestmark = [pytest.mark.multiprocess, pytest.mark.usefixtures("float64")]

TESTS = Path(__file__).parent
ROUNDS = 6
ON = "SIGTERM after-row 99"  # to the end
LOST = "is lost, so this process stops; the same command in all processes goes on"


@pytest.fixture(scope="module", autouse=True)
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_networks(patch)
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ended:
    """How a process ended: its exit code, and what it last said on stderr."""

    def __init__(self, process: subprocess.Popen):
        self.out, self.err = process.communicate(timeout=120)
        self.code = process.returncode
        self.last = (self.err.splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def two_processes(kept_programs):
    """:func:`in_two_processes` with what is compiled kept."""
    return functools.partial(in_two_processes, kept_programs)


def in_two_processes(
    environment: dict[str, str], workdir: Path, *scripts: str, rest=("", ""), command=train_command
) -> tuple[Ended, Ended]:
    """A run in two processes of one CPU device each, which stop themselves where they are told."""
    port = free_port()
    started = []
    for number, (script, own) in enumerate(zip(scripts, rest, strict=True)):
        meet = f"--coordinator_address=127.0.0.1:{port} --num_processes=2 --process_id={number}"
        whole = command(
            workdir, f"--config.mapping.cpu_devices=1 --distributed {meet} --heartbeat_timeout=4"
        )
        environment |= {
            "JAX_ENABLE_X64": "1",
            "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        }
        started.append(
            subprocess.Popen(
                [
                    *(sys.executable, str(TESTS / "tiny_fedhelp.py"), *script.split()),
                    *shlex.split(f"{whole} {own}"),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | environment,
            )
        )
    try:
        first, second = map(Ended, started)
    finally:
        for process in started:
            process.kill()
    return first, second


def without_times(values: dict) -> dict:
    return {k: v for k, v in values.items() if not k.endswith("_s") and k != "versions"}


def last_state(workdir: Path, simulation: CompiledRounds):
    checkpointer = Checkpointer(workdir / "checkpoints")
    found = checkpointer.restore_latest(simulation.state_shapes())
    checkpointer.close()
    assert found is not None and found[0] == ROUNDS
    return found[1]


def simulation_of(workdir: Path, *, num_devices: int, private: bool) -> CompiledRounds:
    config = config_lib.load(workdir / "config.json")
    mapping = make_mapping(1, num_devices, private=private)
    loaded = load(config)
    return CompiledRounds(make_phases(config, loaded, mapping), loaded.federation, seed=config.seed)


def of_clients(state, simulation: CompiledRounds):
    """The state without the rows of nobody."""
    sizes = {group.role: len(group.names) for group in simulation.groups}
    clients = {
        role: jax.tree.map(lambda x, n=sizes[role]: x[:n], own)
        for role, own in state.clients.items()
    }
    return on_host(state._replace(clients=clients))


@pytest.fixture(scope="module")
def finished(two_processes, tmp_path_factory):
    """A run in two processes to its end; not to be changed. Beside it lies what they hold."""
    folder = tmp_path_factory.mktemp("finished")
    script = f"{folder} pool -"
    first, second = two_processes(folder / "run", script, script)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "round 6/6" in first.out and "client_3" in first.out
    assert "round" not in second.out and "client" not in second.out
    return folder / "run"


# --- the same results ---


def test_two_processes_are_as_one(finished, tmp_path):
    """With two devices, bit for bit; with one, up to rounding."""
    assert train(tmp_path / "run") == 0
    for workdir in (finished, tmp_path / "run"):
        assert (workdir / "summary.json").exists()
    ours, theirs = read(finished / "summary.json"), read(tmp_path / "run" / "summary.json")
    assert ours["program"].pop("processes") == ours["measured_by"].pop("processes") == 2
    assert without_times(ours) == without_times(theirs)
    rows = [
        [without_times(row) for row in read(w / "metrics.jsonl")]
        for w in (finished, tmp_path / "run")
    ]
    assert [row["round"] for row in rows[0]] == list(range(1, ROUNDS + 1))
    assert rows[0] == rows[1]
    texts = [(w / "clients.csv").read_bytes() for w in (finished, tmp_path / "run")]
    assert texts[0] == texts[1]
    sharded = simulation_of(finished, num_devices=2, private=True)
    whole = simulation_of(finished, num_devices=1, private=False)
    state = of_clients(last_state(finished, sharded), sharded)
    assert_trees_equal(state, of_clients(last_state(tmp_path / "run", whole), whole))
    assert_trees_close(run(whole, ROUNDS), state, 1e-9)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_clients_with_devices_of_their_own_learn_the_same():
    """With one large client for two devices, and half of the clients in a round."""
    federation = tiny_federation(top_n=1)
    method = build(
        "scaffold", tiny_setup(models=dict.fromkeys(("small", "large"), tiny_model(CLASSES)))
    )
    outcomes = []
    for options in ({}, {"num_devices": 2, "private": True}):
        simulation = simulate(method, federation, participation_rate=0.5, **options)
        state = simulation.init()
        for round in range(2):
            state, _ = simulation.round(state, round)
        outcomes.append((of_clients(state, simulation), simulation.evaluate(state, "test")))
    assert_trees_close(outcomes[1], outcomes[0])


# --- who holds what ---


def test_a_process_holds_only_its_own_clients_images(finished):
    """Of two processes: half of the slots of each role, the last of which nobody has."""
    loaded = load(config_lib.load(finished / "config.json"))
    images = loaded.dataset.images
    clients = {client.name: np.concatenate(client[1:]) for client in loaded.dataset.clients}
    own = (("client_0", "client_1", "client_2"), ("client_3",))
    assert sorted(own[0] + own[1]) == sorted(clients)
    for number, names in enumerate(own):
        (held,) = np.load(finished.parent / f"pool{number}.npz").values()
        held = {image.tobytes() for image in held} - {np.zeros_like(held[0]).tobytes()}
        assert held == {images[i].tobytes() for name in names for i in clients[name]}


# --- what stops them ---


def test_stopped_and_killed_they_go_on_as_if_nothing_had_been(two_processes, finished, tmp_path):
    """SIGINT to one, then the loss of one, then of the first; the same command each time."""
    workdir = tmp_path / "run"
    both = two_processes(workdir, ON, "SIGINT after-rounds 1")
    for ended in both:
        assert ended.code == 130, ended.err
        assert ended.last.startswith("fedhelp: stopped after round 1 of 6, saved in")
    lost_second, killed = two_processes(workdir, ON, "SIGKILL after-rounds 4")
    assert killed.code == -9
    assert lost_second.code == distributed.LOST, lost_second.err
    assert lost_second.last.startswith(f"fedhelp: process 1 {LOST}")
    killed, lost_first = two_processes(workdir, "SIGKILL after-rounds 5", ON)
    assert killed.code == -9
    assert lost_first.code == distributed.LOST, lost_first.err
    assert lost_first.last.startswith(f"fedhelp: process 0 {LOST}")
    first, second = two_processes(workdir, ON, ON)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "going on after round 4 of 6" in first.err
    sharded = simulation_of(finished, num_devices=2, private=True)
    assert_trees_equal(last_state(workdir, sharded), last_state(finished, sharded))
    ours, theirs = read(workdir / "summary.json"), read(finished / "summary.json")
    assert without_times(ours) == without_times(theirs)
    rows = [[without_times(row) for row in read(w / "metrics.jsonl")] for w in (workdir, finished)]
    assert rows[0] == rows[1]


# --- a sweep ---


def sweep_command(workdir: Path, rest: str = "") -> str:
    """Three runs of FedAvg."""
    own = "--sweep=learning_rate=1e-3,2e-3,4e-3 --config.algorithm.name=fedavg"
    return train_command(workdir, f"{own} --config.rounds=1 {rest}").replace("train", "sweep", 1)


def test_two_processes_share_out_the_runs_of_a_sweep(two_processes, tmp_path):
    """Each makes its own, also after one was lost; and one process goes on from those of two."""
    assert fedhelp(sweep_command(tmp_path / "alone")) == 0
    expected = (tmp_path / "alone" / "runs.csv").read_bytes()

    both = tmp_path / "both"
    lost, killed = two_processes(both, ON, "SIGKILL after-program -", command=sweep_command)
    assert killed.code == -9
    assert lost.code == distributed.LOST and f"process 1 {LOST}" in lost.last, lost.err
    assert len(read(both / "runs.1.jsonl")) == 1
    assert not (both / "runs.csv").exists()

    rows = read(both / "runs.jsonl")  # of two runs, if the loss was noticed after them
    (both / "runs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    first, second = two_processes(both, ON, ON, command=sweep_command)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "2 of 3 runs are finished" in first.out and "runs" not in second.out
    assert (both / "runs.csv").read_bytes() == expected

    (both / "runs.jsonl").unlink()
    assert fedhelp(sweep_command(both)) == 0
    assert (both / "runs.csv").read_bytes() == expected


# --- bad use, in one line ---


def test_other_settings_in_another_process_are_refused_by_name(two_processes, tmp_path):
    rest = ("", "--config.batch_size=3")
    for ended in two_processes(tmp_path / "run", ON, ON, rest=rest):
        assert ended.code == 2, ended.err
        assert ended.last.startswith("fedhelp: ")
        assert "same in all processes" in ended.last and "batch_size" in ended.last
        assert "Traceback" not in ended.err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--process_id=0", "--process_id is for --distributed"),
        ("--distributed --process_id=0", "go together"),
        ("--distributed --coordinator_address=a:1 --num_processes=2", "go together"),
        (
            "--distributed --coordinator_address=a --num_processes=2 --process_id=0",
            "--coordinator_address=a: must be HOST:PORT",
        ),
        (
            "--distributed --coordinator_address=a:1 --num_processes=2 --process_id=2",
            "--process_id=2: must be one of 0 to",
        ),
    ],
)
def test_flags_that_do_not_fit_together(capsys, tmp_path, given, said):
    assert said in refusal(capsys, train(tmp_path / "run", given))


def test_what_needs_all_data_in_one_place_is_refused(monkeypatch, tmp_path, finished):
    values = json.loads((finished / "config.json").read_text())
    values["algorithm"] = {"name": "centralized", "settings": {}}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(distributed.Agreed, match="algorithm.name: centralized"):
        runner.train(config_lib.from_dict(values), tmp_path)


def test_a_run_of_two_processes_is_not_for_one(capsys, finished):
    """Its checkpoints hold slots for two devices."""
    assert "'processes': 2" in refusal(capsys, fedhelp(f"evaluate --workdir={finished}"))
