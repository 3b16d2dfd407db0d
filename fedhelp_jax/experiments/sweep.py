"""Sweeps: many runs that differ in numbers or seeds, compiled as one program over an axis of runs.

Settings that are numbers in the traced program (a rate, a loss weight, the seed) vary along that
axis. Settings that determine shapes (batch size, architecture) need separate programs. A run in a
sweep computes the same as it does alone: its clients run one after the other or vectorised, as
``mapping.chunk_size`` says. The devices divide the runs among themselves instead of the clients.

``WORKDIR/runs.jsonl`` gets one line per finished run, identified by its settings. The same command
resumes where it stopped, and a command with more values or seeds runs only what is missing. With
several processes, each makes a share of the runs on its own devices and writes its own file,
``runs.1.jsonl`` and so on. Any number of processes can resume from all of these files.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedhelp_jax.core import distributed
from fedhelp_jax.core.compilation import compile_totals, jit
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.locks import folder_lock
from fedhelp_jax.core.memory import device_bytes, free_host_bytes, gib, program_bytes
from fedhelp_jax.core.storage import append_line
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.experiment import MOST_ROUNDS, make_phases
from fedhelp_jax.experiments.sweep_blocks import Block, Run, blocks, numbers, with_numbers
from fedhelp_jax.experiments.sweep_folder import finished_runs, lines_file, refuse_other_data
from fedhelp_jax.report import run_files
from fedhelp_jax.report.console import duration
from fedhelp_jax.report.summary import group_summary, headline
from fedhelp_jax.report.sweeps import write_sweep
from fedhelp_jax.simulation.divergence import Divergence
from fedhelp_jax.simulation.recheck import recheck
from fedhelp_jax.simulation.round import FederationArrays, RoundProgram, RunState, num_clients
from fedhelp_jax.simulation.vectorize import make_mapping, over_clients
from fedhelp_jax.typing import JsonObject, PyTree, Record


def sweep(
    runs: Sequence[Run],
    workdir: Path,
    *,
    split: str = "validation",
    runs_at_once: int | None = None,
    say: Callable[[str], None] = print,
) -> list[JsonObject]:
    """Makes the runs that are missing in a folder, and writes the table and pictures of all runs.

    With several processes, all must call it with the same arguments. Each returns all rows, and the
    first writes the table and the pictures.

    Args:
      runs: The runs of the sweep.
      workdir: The folder of the sweep.
      split: The split that the final models are evaluated on. Choose settings on "validation"; use
        "test" for runs that differ only in what is not chosen, such as seeds.
      runs_at_once: How many runs a device vectorises. None takes 1 on CPU; on accelerators it takes
        as many as fit in memory, estimated from a single run.
      say: Called with each line of progress.

    Returns:
      One row per run: the swept values, ``small_mean``, ``large_mean``, ``worst_small``, ``gap``.

    Raises:
      UserError: If the data does not fit the settings, or the runs do not fit in memory.
    """
    if any(run.config.mapping.max_device_bytes for run in runs):
        raise UserError(
            "config.mapping.max_device_bytes must be 0: a sweep keeps all images on the devices"
        )
    if any(run.config.tracking for run in runs):
        raise UserError("config.tracking must be empty: a sweep reports its runs in runs.csv only")
    if len({run.fingerprint for run in runs}) < len(runs):
        raise UserError(
            f"some of the {len(runs)} runs differ in nothing that makes another run: a sweep is "
            "not for settings that say where data lie, how a teacher is asked or how runs are "
            "mapped"
        )
    with folder_lock(workdir):
        return _sweep(runs, workdir, split, runs_at_once, say)


def _sweep(
    runs: Sequence[Run],
    workdir: Path,
    split: str,
    runs_at_once: int | None,
    say: Callable[[str], None],
) -> list[JsonObject]:
    finished = finished_runs(workdir, split)
    missing = [run for run in runs if run.fingerprint not in finished]
    before = [run for run in runs if run.fingerprint in finished]
    refuse_other_data([(run.config, finished[run.fingerprint]) for run in before], workdir)
    if len(missing) < len(runs):
        say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished")
    own = missing[jax.process_index() :: jax.process_count()]
    if missing and jax.process_count() > 1:
        say(f"of {len(missing)} runs each of {jax.process_count()} processes makes its share")
    for line in _made(own, split, runs_at_once, say):
        append_line(lines_file(workdir, jax.process_index()), json.dumps(line, allow_nan=False))
    distributed.wait_for_all("sweep")
    finished = finished_runs(workdir, split)
    names = list(dict.fromkeys(name for run in runs for name in run.swept))
    table = [{**run.swept, **_measures(finished[run.fingerprint])} for run in runs]
    if distributed.is_coordinator():
        write_sweep(workdir, names, table, split)
    return table


def _made(
    runs: Sequence[Run], split: str, runs_at_once: int | None, say: Callable[[str], None]
) -> Iterator[JsonObject]:
    """Makes runs and yields the line of each."""
    started, before, done, running = time.monotonic(), compile_totals(), 0, 0.0
    programs = list(blocks(runs))
    for number, block in enumerate(programs):
        program = Program(block, split, runs_at_once)
        say(f"program {number + 1} of {len(programs)}: {program.plan()}")
        begun = time.monotonic()
        for part, rows in program.results():
            for run, row in zip(part, rows, strict=True):
                line = {
                    "fingerprint": run.fingerprint,
                    "split": split,
                    "sources": block.sources[run.config.seed],
                    "left_out": block.left_out[run.config.seed],
                    "algorithm": run.config.algorithm.name,
                    "dataset": block.loaded.dataset.name,
                    "synthetic": block.loaded.dataset.synthetic,
                    **run.swept,
                    **row,
                }
                yield run_files.plain(line)
            done += len(part)
            running += time.monotonic() - begun
            begun = time.monotonic()
            left = running / done * (len(runs) - done)
            say(f"{done} of {len(runs)} runs" + (f"  left {duration(left)}" if left else ""))
    if runs:
        compiled = compile_totals()
        say(
            f"{len(runs)} runs in {duration(time.monotonic() - started)}, of which compiling took "
            f"{duration(compiled.seconds - before.seconds)}"
        )


def _measures(line: Record) -> JsonObject:
    found = {name: line[name] for name in ("split", "metric", *group_summary({}))}
    more = ("diverged", "left_out", "algorithm", "dataset", "synthetic")
    return found | {name: line.get(name) for name in more}


# --- the program --------------------------------------------------------------------------------


class Program:
    """The compiled functions of a block, and the number of runs that they take at once."""

    def __init__(self, block: Block, split: str, runs_at_once: int | None = None):
        """Compiles the functions.

        On an accelerator they are first compiled for one run, to estimate how many runs fit in
        memory.
        """
        self.block, self.split = block, split
        self.config = block.runs[0].config
        self.shared = [jnp.asarray(leaf) for leaf in block.arrays]
        self.devices = jax.local_devices()
        on_cpu = self.devices[0].platform == "cpu"
        self._compile(min(runs_at_once or 1, self._most()))
        limit = free_host_bytes() if on_cpu else device_bytes(self.devices[0])
        if runs_at_once is None and not on_cpu and limit is not None:
            fitting = int(0.8 * limit / self.bytes_at_once)
            if fitting > 1 and self._most() > 1:
                self._compile(min(fitting, self._most()))
        if limit is not None and self.bytes_at_once * (len(self.devices) if on_cpu else 1) > limit:
            raise UserError(
                f"{self.plan()}, but {gib(limit)} are free: lower --runs_at_once, "
                "config.batch_size, config.mapping.chunk_size or config.mapping.cpu_devices"
            )

    def plan(self) -> str:
        """Returns a line that describes what will be run, and in how much memory."""
        runs, devices = len(self.block.runs), self.mapping.num_devices
        return (
            f"{runs} runs, {self.slots} at a time ({self.per_device} on each of {devices} "
            f"{'device' if devices == 1 else 'devices'}), {gib(self.bytes_at_once)} a device"
        )

    def results(self) -> Iterator[tuple[list[Run], list[JsonObject]]]:
        """Yields runs and their rows as they finish."""
        task, clients = self.block.loaded.task, num_clients(self.block.loaded.federation)
        models = self._phases(self.config).algorithm.clients
        for start in range(0, len(self.block.runs), self.slots):
            part = self.block.runs[start : start + self.slots]
            point = self._points(part)
            state = self._init(self.shared, point, ())
            names = {group.role: group.names for group in self.block.loaded.federation.groups}
            health = [Divergence(names, run=run.name) for run in part]
            every = self._most_rounds
            for done in range(0, self.config.rounds, every):
                last = min(done + every, self.config.rounds)
                bounds = np.int32(done), np.int32(last)
                state, infos = self._rounds(self.shared, point, state, *bounds)
                infos = jax.device_get(infos)
                for i, own in enumerate(health):
                    for round in range(last - done):
                        info = jax.tree.map(lambda x, i=i, round=round: x[i][round], infos)
                        own.trained(done + round + 1, *info)
            measured = jax.device_get(self._evaluate(self.shared, point, state))
            rows = []
            for i in range(len(part)):
                results = {
                    role: {
                        name: {m: v[i][: clients[role]] for m, v in measured[role][name].items()}
                        for name in models[role].models
                    }
                    for role in clients
                }
                if start == i == 0:
                    self._recheck(state, results)
                health[i].measured(self.split, results)
                summary = group_summary(health[i].scores(headline(results, task.headline)))
                row = {"metric": task.headline, **summary, "diverged": health[i].count}
                rows.append(row)
            yield part, rows

    def _recheck(self, state: PyTree, results: PyTree) -> None:
        """Evaluates one client of each role of the first run again.

        Raises:
          Failure: If the results differ by more than rounding explains.
        """
        # The data is kept only for one seed, that of the first run.
        config, loaded = self.block.runs[0].config, self.block.loaded
        first = jit(
            lambda tree: jax.tree.map(lambda leaf: leaf[0], tree),
            platform=self.mapping.platform,
            optimized=False,
            out_shardings=self.mapping.replicated,
        )
        state = jax.tree.map(np.asarray, first(state))
        federation = loaded.federation
        phases, half = self._phases(config), config.model.compute_dtype == "bfloat16"
        at = phases, federation.groups, federation.public, state, loaded.dataset, self.split
        recheck(*at, results, bfloat16=half)

    @property
    def _most_rounds(self) -> int:
        """The maximum number of rounds in one dispatch."""
        return min(self.config.checkpoint_every, self.config.rounds, MOST_ROUNDS)

    def _most(self) -> int:
        return -(-len(self.block.runs) // len(self.devices))

    def _compile(self, per_device: int) -> None:
        devices = min(len(self.devices), len(self.block.runs))
        self.per_device, self.slots = per_device, per_device * devices
        chunk = 1 if per_device == 1 else 0
        self.mapping = mapping = make_mapping(chunk, devices, local=True)
        self.shared = jax.device_put(self.shared, mapping.replicated)
        self._init, rounds, self._evaluate = self._programs()
        point = self._points(self.block.runs[: self.slots])
        state = self._init(self.shared, point, ())  # compilation depends on its sharding
        zero = np.int32(0)
        self._rounds = rounds.lower(self.shared, point, state, zero, zero).compile()
        self.bytes_at_once = program_bytes(self._rounds)

    def _programs(self) -> tuple[Any, Any, Any]:
        """Returns initialisation, rounds and evaluation of all runs that are made at once."""
        mapping = self.mapping
        by_run = NamedSharding(mapping.mesh, P(*mapping.by_client.spec))
        program = functools.partial(jit, platform=mapping.platform, out_shardings=by_run)

        def over(fn: Callable[..., Any]) -> Callable[..., Any]:
            """Maps ``fn(leaves, point, state, *rest)`` of one run over all runs."""

            def one(shared: PyTree, run: PyTree) -> PyTree:
                leaves, rest = shared
                return fn(leaves, *run, *rest)

            return lambda leaves, point, state, *rest: over_clients(one, mapping)(
                (leaves, rest), (point, state)
            )

        return (
            program(over(self._init_one), optimized=False),
            program(over(self._rounds_of_one), donate_argnums=2),
            program(over(self._evaluate_one)),
        )

    def _points(self, runs: Sequence[Run]) -> PyTree:
        """Returns what varies along the axis of runs; empty slots repeat the last run."""
        runs = [*runs, *[runs[-1]] * (self.slots - len(runs))]
        point = {
            "key": jax.vmap(jax.random.key)(
                jnp.asarray([run.config.seed for run in runs], jnp.uint32)
            ),
            "data": np.asarray([self.block.seeds.index(run.config.seed) for run in runs], np.int32),
            "numbers": {
                name: np.asarray([numbers(run.config)[name] for run in runs], float)
                for name in self.block.traced
            },
        }
        return jax.device_put(point, self.mapping.by_client)

    def _data(self, leaves: PyTree, point: PyTree) -> FederationArrays:
        picked = [
            leaf[point["data"]] if apart else leaf
            for leaf, apart in zip(leaves, self.block.by_seed, strict=True)
        ]
        return jax.tree.unflatten(self.block.structure, picked)

    def _phases(self, config: RunConfig) -> RoundProgram:
        one_device = make_mapping(config.mapping.chunk_size, 1, local=True)
        return make_phases(config, self.block.loaded, one_device)

    def _at(self, point: PyTree) -> RoundProgram:
        return self._phases(with_numbers(self.config, point["numbers"]))

    def _init_one(self, leaves: PyTree, point: PyTree, _: Any) -> RunState:
        return self._at(point).init(point["key"], self._data(leaves, point))

    def _rounds_of_one(
        self, leaves: PyTree, point: PyTree, state: RunState, first: jax.Array, last: jax.Array
    ) -> tuple[RunState, PyTree]:
        """Returns the final state, and each round's participants and non-finite clients."""
        data, most = self._data(leaves, point), self._most_rounds
        phases, key = self._at(point), point["key"]
        state, infos = phases.rounds(state, key, first, last, data, most=most)
        return state, (infos.participants, infos.non_finite)

    def _evaluate_one(self, leaves: PyTree, point: PyTree, state: RunState) -> PyTree:
        phases, data = self._at(point), self._data(leaves, point)
        return {
            role: phases.evaluate(
                role,
                state.clients[role],
                state.server,
                data,
                phases.everyone(role, data, self.split),
            ).metrics
            for role in phases.num_clients
        }
