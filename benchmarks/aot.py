"""Compiles the programs of a round for accelerators that need not be there, and counts their work.

    make aot                                      # those that a change should pass, in minutes
    .aot/bin/python -m benchmarks.aot --all       # every method and target, in an hour
    .aot/bin/python -m benchmarks.aot --only='v5e/*,*/train_small' --clients=1024
    .aot/bin/python -m benchmarks.aot --all --record            # renews benchmarks/aot.json

XLA compiles for an NVIDIA H100 and for TPU v5e chips by their descriptions, from shapes alone, on a
machine that has neither. Every program must compile and fit the device's memory, call nothing on
the host, and have no loop over clients. It must not exceed the recorded kernels, bytes and
temporaries by more than 10 %, unless those were recorded with other versions of the compilers.

A program is named ``target/method-kind/program`` (see `config_of`). ``v5e-4`` is four chips, each
with only its own clients' data; its figures are those of one chip. Loops over a client's steps have
an unknown number of iterations, so the figures are those of one step (`benchmarks.count`). The
estimated times are no measurements.
"""

import fnmatch
import functools
import json
import os
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from benchmarks.count import CHIPS, Count, count
from fedhelp_jax import tasks
from fedhelp_jax.data.federation import make_federation
from fedhelp_jax.data.types import ClientSplit, FederatedDataset, PublicDataset
from fedhelp_jax.experiments import sweep
from fedhelp_jax.experiments.config import RunConfig, default_config, validate
from fedhelp_jax.experiments.experiment import Loaded, make_phases
from fedhelp_jax.experiments.sweep_blocks import Block, Run
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.round import (
    FederationArrays,
    RoundProgram,
    federation_arrays,
    num_clients,
    server_part,
)
from fedhelp_jax.simulation.sharding import place
from fedhelp_jax.simulation.vectorize import Mapping
from fedhelp_jax.teachers.answers import Answers
from fedhelp_jax.typing import JsonObject, PyTree

_ALL = flags.DEFINE_boolean("all", False, "compile every program, not only the default ones")
_ONLY = flags.DEFINE_list("only", None, "patterns of the programs to compile, such as h100/*")
_CLIENTS = flags.DEFINE_integer("clients", 64, "clients; 5 of 16 are large")
_RECORD = flags.DEFINE_boolean("record", False, "record the figures instead of checking them")
_TEXTS = flags.DEFINE_string("texts", None, "folder that gets the programs, for benchmarks.count")
_MARKDOWN = flags.DEFINE_string("markdown", None, "file that gets the table")

_RECORDED = Path(__file__).with_suffix(".json")
_TOLERANCE = 1.1
_IMAGES, _PUBLIC, _CLASSES, _ANSWERS, _ROUNDS = 64, 96, 8, 10, 3
_RUNS, _SWEPT_CLIENTS = 24, 19

# What XLA must know of an H100 (SXM), which it otherwise asks the driver.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# libtpu otherwise asks the metadata server of a cloud.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Target(NamedTuple):
    """A chip of `benchmarks.count.CHIPS`, how many of it, and the bytes of memory of each."""

    chip: str
    devices: int
    memory: int


TARGETS = {
    "h100": Target("h100", 1, 80 * 10**9),
    "v5e": Target("v5e", 1, 16 * 2**30),
    "v5e-4": Target("v5e", 4, 16 * 2**30),
}

# Those that a change should pass, the most important first. Compilers of TPUs take minutes for a
# ResNet, so that here a smaller network stands for it.
DEFAULT = (
    "h100/fedhelp/train_small",
    "v5e/fedavg-cnn/train_small",
    "h100/fedhelp/aggregate",
    "h100/fedhelp/evaluate_small",
    "h100/fedavg/train_small",
    "h100/fedhelp-masks/train_small",
)
# The others. Methods that differ from these only in what the server does with uploads, or in a term
# of the gradient, are left out.
REST = (
    *("v5e/fedhelp/train_small", "v5e/fedavg/train_small", "v5e-4/fedhelp-cnn/train_small"),
    *("v5e-4/fedhelp-cnn/aggregate", "v5e-4/fedhelp-cnn/evaluate_small", "h100/fedavg/rounds"),
    *("h100/fedhelp-sweep/rounds", "h100/fedhelp/train_large", "h100/fedhelp/rounds"),
    *(f"h100/{name}/aggregate" for name in ("feddf", "fedgh", "centralized")),
    *(
        f"h100/{name}/train_small"
        for name in (
            *("scaffold", "ditto", "per_fedavg", "pfedme", "fml"),
            *("fedmd", "fedproto", "fedkd", "fedtype"),
        )
    ),
    *("h100/fedhelp/evaluate_large", "h100/fedavg/aggregate", "h100/fedavg/evaluate_small"),
    *("h100/fedhelp-masks/train_large", "h100/fedhelp-masks/evaluate_small"),
    *("v5e/fedhelp/aggregate", "v5e/fedhelp/evaluate_small", "v5e/fedhelp-masks/train_small"),
    *("v5e-4/fedhelp/train_small", "v5e-4/fedavg-cnn/rounds"),
)


class Figures(NamedTuple):
    """What is recorded of a program."""

    kernels: int
    bytes: int
    flop: int
    temporaries: int


# --- devices and programs -----------------------------------------------------------------------


@functools.cache
def mapping_of(target: str) -> Mapping:
    """Returns the mapping of clients to the devices of a target."""
    chip, devices, _ = TARGETS[target]
    if chip == "h100":
        found = topologies.get_topology_desc(
            platform="cuda", target_config=_H100, topology="1x1x1"
        ).devices
    else:
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return Mapping(Mesh(np.array(found[:devices]), ("clients",)), 0, private=devices > 1)


def placed(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Returns the shapes of a tree, with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding), tree
    )


def run_key() -> PyTree:
    """Returns the shape of a run's key."""
    return jax.eval_shape(lambda: jax.random.key(0))


class AbsentRounds(CompiledRounds):
    """The programs of a run, lowered for devices that are not there."""

    def _placed(self, federation: Any) -> FederationArrays:
        private, devices = self.mapping.private, self.mapping.num_devices
        here = Mapping(Mesh(np.array(jax.devices()[:devices]), ("clients",)), 0, private)

        def there(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            return placed(leaf, NamedSharding(self.mapping.mesh, leaf.sharding.spec))

        return jax.tree.map(there, place(federation, here))

    def _drawn_from(self, seed: int) -> PyTree:
        return placed(run_key(), self.mapping.replicated)

    def lower(self, program: str) -> Any:
        """Lowers a program, such as "train_small"."""
        name, _, role = program.partition("_")
        state, now = self.state_shapes(), np.int32(0)
        rest = self.run_key, now, self.federation
        if name == "train":
            return self._train[role].lower(state.clients[role], state.server, *rest)
        if name == "aggregate":
            trained = {group.role: self.train_shapes(group, state) for group in self.groups}
            return self._aggregate.lower(
                state, placed(server_part(trained), self.mapping.by_client), *rest
            )
        if name == "evaluate":
            everyone = self.phases.everyone(role, self.federation, "test")
            own = state.clients[role], state.server
            return self._evaluate[role].lower(*own, self.federation, everyone)
        assert name == "rounds", program
        return self._rounds.lower(state, self.run_key, now, now, self.federation)


class AbsentSweep(sweep.Program):
    """The rounds of a sweep, lowered for one device that is not there."""

    def __init__(self, block: Block, mapping: Mapping):
        self.block, self.split, self.config = block, "validation", block.runs[0].config
        self.mapping, self.slots = mapping, len(block.runs)

    def _phases(self, config: RunConfig) -> RoundProgram:
        return make_phases(config, self.block.loaded, self.mapping)

    def lower(self, program: str) -> Any:
        """Lowers the rounds."""
        assert program == "rounds", program
        point = {
            "key": jax.eval_shape(lambda: jax.vmap(jax.random.key)(np.arange(self.slots))),
            "data": np.zeros(self.slots, np.int32),
            "numbers": {name: np.zeros(self.slots, np.float32) for name in self.block.traced},
        }
        point = placed(point, self.mapping.by_client)
        shared = placed(self.block.arrays, self.mapping.replicated)
        init, rounds, _ = self._programs()
        state = placed(init.eval_shape(shared, point, ()), self.mapping.by_client)
        return rounds.lower(shared, point, state, np.int32(0), np.int32(0))


# --- runs without data --------------------------------------------------------------------------


def config_of(method: str, **changes: Any) -> RunConfig:
    """Returns the settings of a run of a method.

    After its name, ``-masks`` is segmentation with small U-Nets, and ``-cnn`` two small CNNs
    instead of ResNet-20 and ResNet-110.
    """
    name, _, kind = method.partition("-")
    config = default_config()
    config.algorithm.name = name
    config.batch_size = config.public_batch_size = 16
    config.rounds = config.checkpoint_every = _ROUNDS
    config.data.image_size = 32
    if kind == "masks":
        config.task, config.data.image_size = "segmentation", 64
        config.batch_size = config.public_batch_size = 4
        config.model.small, config.model.large = "unet_small_cpu", "unet_large_cpu"
    elif kind == "cnn":
        config.model.small = config.model.large = "cnn_large"
    config.update(changes)
    return validate(config)


def loaded_for(config: RunConfig, clients: int) -> Loaded:
    """Returns data of a run whose values are all zero."""
    side, masks = config.data.image_size, config.task == "segmentation"
    names = ("lesion",) if masks else tuple(map(str, range(_CLASSES)))
    target = (side, side) if masks else ()

    def zeros(count: int) -> tuple[np.ndarray, np.ndarray]:
        kind = np.uint8 if masks else np.int32
        return np.zeros((count, side, side, 3), np.uint8), np.zeros((count, *target), kind)

    own = np.arange(clients * _IMAGES, dtype=np.int32).reshape(clients, _IMAGES)
    few = _IMAGES // 8
    splits = tuple(
        ClientSplit(f"c{i}", rows[2 * few :], rows[:few], rows[few : 2 * few])
        for i, rows in enumerate(own)
    )
    dataset = FederatedDataset("zeros", True, *zeros(own.size), names, splits)
    answered = ("lesion",) if masks else tuple(map(str, range(_ANSWERS)))
    images, labels = zeros(_PUBLIC)
    public = PublicDataset("zeros", True, images, labels, names, (), images)
    logits = np.zeros((_PUBLIC, *target, len(answered)), np.float32)
    answers = Answers(logits, (), answered, "zeros")
    large = clients * 5 // 16
    roles = ("large",) * large + ("small",) * (clients - large)
    federation = make_federation(dataset, roles, public, logits, on_host=True)
    task = tasks.segmentation(names) if masks else tasks.classification
    return Loaded(task, dataset, roles, public, answers, federation)


def absent(target: str, method: str, clients: int) -> tuple[Any, set[int]]:
    """Returns the programs of a method, and the lengths that a loop over clients could have."""
    mapping = mapping_of(target)
    if method.endswith("-sweep"):
        rates = np.geomspace(1e-4, 1e-2, _RUNS).tolist()
        small = {"model": {"large": "resnet32"}}
        configs = [config_of(method, learning_rate=rate, **small) for rate in rates]
        loaded = loaded_for(configs[0], _SWEPT_CLIENTS)
        arrays, structure = jax.tree.flatten(federation_arrays(loaded.federation))
        runs = [Run({"learning_rate": c.learning_rate}, c) for c in configs]
        apart = [False] * len(arrays)
        block = Block(
            runs, ("learning_rate",), loaded, arrays, apart, structure, [0], {0: {}}, {0: 0}
        )
        lengths = {_RUNS, _SWEPT_CLIENTS, *num_clients(loaded.federation).values()}
        return AbsentSweep(block, mapping), lengths
    config = config_of(method)
    loaded = loaded_for(config, clients)
    phases = make_phases(config, loaded, mapping)
    numbers = num_clients(loaded.federation)
    slots = {mapping.slots(n) // mapping.num_devices for n in numbers.values()}
    programs = AbsentRounds(phases, loaded.federation, rounds_at_once=_ROUNDS)
    return programs, {*numbers.values(), *slots, clients}


# --- checks -------------------------------------------------------------------------------------


def faults(
    target: Target, compiled: Any, counted: Count, lengths: set[int], before: Figures | None
) -> list[str]:
    """Returns what is wrong with a program."""
    found, text = [], compiled.as_text()
    for host in re.findall(r'custom_call_target="[^"]*callback|\b(?:infeed|outfeed)\(', text):
        found.append(f"calls the host: {host}")
    for loop in counted.loops:
        inside = Count([k for k in counted.kernels if k.path[: len(loop.path)] == loop.path], [])
        # A TPU gathers the indices of a batch one client after the other, which is negligible.
        if loop.trips in lengths and (inside.flop or inside.bytes > counted.bytes / 100):
            found.append(f"loops over clients: {'/'.join(loop.path)}, {loop.trips} times")
    sizes = compiled.memory_analysis()
    needed = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes
    needed += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    if needed > target.memory:
        found.append(f"needs {needed / 2**30:.1f} GiB of {target.memory / 2**30:.1f}")
    now = figures(compiled, counted)
    for name in ("kernels", "bytes", "temporaries"):
        was, value = getattr(before, name, None), getattr(now, name)
        if was is not None and value > _TOLERANCE * was:
            found.append(f"{name}: {value}, recorded {was}")
    return found


def figures(compiled: Any, counted: Count) -> Figures:
    """Returns what is recorded of a program."""
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Figures(counted.launches, counted.bytes, counted.flop, temporaries)


def row(name: str, found: Figures, counted: Count) -> str:
    """Returns a row of the table."""
    target, method, program = name.split("/")
    milliseconds = 1e3 * counted.seconds(CHIPS[TARGETS[target].chip])
    return (
        f"| {target} | {method} | {program} | {found.kernels} | {found.bytes / 1e9:.2f} | "
        f"{found.flop / 1e9:.1f} | {found.temporaries / 2**30:.2f} | {milliseconds:.2f} |"
    )


HEADER = """\
| target | method | program | kernels | GB | GFLOP | temporaries, GiB | estimated ms |
| -- | -- | -- | -- | -- | -- | -- | -- |"""


def chosen() -> list[str]:
    """Returns the programs that the flags ask for."""
    names = (*DEFAULT, *REST) if _ALL.value or _ONLY.value else DEFAULT
    patterns = _ONLY.value or ["*"]
    return [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]


def compilers() -> dict[str, str]:
    """Returns the versions of what the figures depend on."""
    return {name: metadata.version(name) for name in ("jaxlib", "libtpu")}


def recorded_figures() -> JsonObject:
    """Returns the versions and figures of `benchmarks/aot.json`, or no figures for other versions.

    The figures are by number of clients and name of the program.
    """
    found = json.loads(_RECORDED.read_text()) if _RECORDED.exists() else {"versions": compilers()}
    if found["versions"] != compilers():
        print(f"compilers {compilers()}, recorded {found['versions']}: no figures are compared")
        found = {"versions": compilers()}
    return {"figures": {}} | found


def main(_: list[str]) -> None:
    """Compiles, checks and counts the chosen programs."""
    jax.config.update("jax_platforms", "cpu")  # else the CUDA plug-in looks for a driver
    jax.config.update("jax_num_cpu_devices", max(target.devices for target in TARGETS.values()))
    recorded = recorded_figures()
    own = recorded["figures"].setdefault(str(_CLIENTS.value), {})
    table, wrong = [HEADER], []
    for name in chosen():
        target, method, program = name.split("/")
        began = time.monotonic()
        programs, lengths = absent(target, method, _CLIENTS.value)
        try:
            compiled = programs.lower(program).compile()
        except Exception as error:  # XLA has no more precise type
            wrong.append(f"{name} does not compile: {str(error).splitlines()[0]}")
            print(wrong[-1], flush=True)
            continue
        counted = count(compiled.as_text())
        if _TEXTS.value:
            Path(_TEXTS.value, name.replace("/", "_") + ".txt").write_text(compiled.as_text())
        before = Figures(**own[name]) if name in own and not _RECORD.value else None
        bad = faults(TARGETS[target], compiled, counted, lengths, before)
        print(f"{name}: compiled in {time.monotonic() - began:.0f} s", *bad, sep="\n  ", flush=True)
        wrong += [f"{name} {fault}" for fault in bad]
        found = figures(compiled, counted)
        table.append(row(name, found, counted))
        if _RECORD.value:
            own[name] = found._asdict()
            _RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    print("\n".join(table))
    if _MARKDOWN.value:
        Path(_MARKDOWN.value).write_text("\n".join(table) + "\n")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    app.run(main)
