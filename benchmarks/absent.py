"""The programs of runs, lowered for devices that are not there, from shapes alone."""

import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

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
from fedhelp_jax.simulation.sharding import place, shapes_on
from fedhelp_jax.simulation.vectorize import Mapping
from fedhelp_jax.teachers.answers import Answers
from fedhelp_jax.typing import PyTree

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
# libtpu otherwise asks the metadata server of a cloud, and runs in one process at a time.
_TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
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


def run_key() -> PyTree:
    """Returns the shape of a run's key."""
    return jax.eval_shape(lambda: jax.random.key(0))


class AbsentRounds(CompiledRounds):
    """The programs of a run, lowered for devices that are not there."""

    def _placed(self, federation: Any) -> FederationArrays:
        private, devices = self.mapping.private, self.mapping.num_devices
        here = Mapping(Mesh(np.array(jax.devices()[:devices]), ("clients",)), 0, private)

        def there(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            return shapes_on(leaf, NamedSharding(self.mapping.mesh, leaf.sharding.spec))

        return jax.tree.map(there, place(federation, here))

    def _drawn_from(self, seed: int) -> PyTree:
        return shapes_on(run_key(), self.mapping.replicated)

    def lower(self, program: str) -> Any:
        """Lowers a program, such as "train_small"."""
        name, _, role = program.partition("_")
        state = self.state_shapes()
        if name == "aggregate":
            trained = {group.role: self.train_shapes(group, state) for group in self.groups}
            uploaded = shapes_on(server_part(trained), self.mapping.by_client)
            rest = self.run_key, np.int32(0), self.federation
            return self._aggregate.lower(state, uploaded, *rest)
        if name == "rounds":
            call = self._together(state)
        else:
            calls = {"train": self._trainings, "evaluate": self._evaluations}[name](state)
            call = calls[list(self._train).index(role)]
        return call.program.lower(*call.args)


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
        point = shapes_on(point, self.mapping.by_client)
        shared = shapes_on(self.block.arrays, self.mapping.replicated)
        init, rounds, _ = self._programs()
        state = shapes_on(init.eval_shape(shared, point, ()), self.mapping.by_client)
        return rounds.lower(shared, point, state, np.int32(0), np.int32(0))


# --- runs without data --------------------------------------------------------------------------


def config_of(method: str, **changes: Any) -> RunConfig:
    """Returns the settings of a run of a method.

    After its name, ``-masks`` is segmentation with small U-Nets, ``-cnn`` two small CNNs instead of
    ResNet-20 and ResNet-110, ``-sweep`` a ResNet-32 instead of the latter, and ``-bf16`` networks
    that compute in bfloat16.
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
    elif kind == "sweep":
        config.model.large = "resnet32"
    elif kind == "bf16":
        config.model.compute_dtype = "bfloat16"
    config.update(changes)
    return validate(config)


def loaded_for(config: RunConfig, clients: int, large: int) -> Loaded:
    """Returns data of a run whose values are all zero; so many of the clients are large."""
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
    roles = ("large",) * large + ("small",) * (clients - large)
    federation = make_federation(dataset, roles, public, logits, on_host=True)
    task = tasks.segmentation(names) if masks else tasks.classification
    return Loaded(task, dataset, roles, public, answers, federation)


def lengths_of(loaded: Loaded, mapping: Mapping) -> set[int]:
    """Returns the lengths that a loop over clients could have."""
    numbers = num_clients(loaded.federation)
    slots = {mapping.slots(number) // mapping.num_devices for number in numbers.values()}
    return {*numbers.values(), *slots, len(loaded.roles)}


def rounds_of(method: str, clients: int, mapping: Mapping) -> tuple[AbsentRounds, set[int]]:
    """Returns the programs of a run, and the lengths that a loop over clients could have."""
    config = config_of(method)
    loaded = loaded_for(config, clients, large=clients * 5 // 16)
    phases = make_phases(config, loaded, mapping)
    programs = AbsentRounds(phases, loaded.federation, rounds_at_once=_ROUNDS)
    return programs, lengths_of(loaded, mapping)


def sweep_of(method: str, mapping: Mapping) -> tuple[AbsentSweep, set[int]]:
    """Returns what `rounds_of` does, for a sweep over learning rates."""
    configs = [config_of(method, learning_rate=rate) for rate in np.geomspace(1e-4, 1e-2, _RUNS)]
    loaded = loaded_for(configs[0], _SWEPT_CLIENTS, large=_SWEPT_CLIENTS * 5 // 16)
    arrays, structure = jax.tree.flatten(federation_arrays(loaded.federation))
    block = Block(
        runs=[Run({"learning_rate": config.learning_rate}, config) for config in configs],
        traced=("learning_rate",),
        loaded=loaded,
        arrays=arrays,
        by_seed=[False] * len(arrays),
        structure=structure,
        seeds=[0],
        sources={0: {}},
        left_out={0: 0},
    )
    return AbsentSweep(block, mapping), {_RUNS, *lengths_of(loaded, mapping)}


def programs_of(name: str, clients: int) -> tuple[AbsentRounds | AbsentSweep, set[int]]:
    """Returns the programs of ``target/method-kind``, and the lengths of loops over clients."""
    target, method = name.split("/")[:2]
    if method.endswith("-sweep"):
        return sweep_of(method, mapping_of(target))
    return rounds_of(method, clients, mapping_of(target))
