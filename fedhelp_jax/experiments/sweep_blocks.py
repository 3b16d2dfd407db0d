"""Groups the runs of a sweep by program, with the numbers and data in which they differ."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedhelp_jax.algorithms import settings_of
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.experiment import Loaded, load
from fedhelp_jax.experiments.identity import identity, sources
from fedhelp_jax.simulation.round import FederationArrays, federation_arrays, num_clients
from fedhelp_jax.typing import JsonObject, PyTree, Record

_TOP_LEVEL = ("learning_rate", "weight_decay")
_SERVER = ("learning_rate", "momentum", "beta2", "eps")


class Run(NamedTuple):
    """One run of a sweep: its swept values, which identify it in tables, and all its settings."""

    swept: Record
    config: RunConfig

    @property
    def name(self) -> str:
        """The swept names and values, which distinguish the run from the others."""
        return ", ".join(f"{name} {value}" for name, value in self.swept.items())

    @property
    def fingerprint(self) -> str:
        """The hash of the settings that identify the run."""
        text = json.dumps(identity(self.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


# --- numbers that may be traced -----------------------------------------------------------------


def numbers(config: RunConfig) -> dict[str, float]:
    """Returns the numeric settings that no shape depends on, by dotted key."""
    found = {name: vars(config)[name] for name in _TOP_LEVEL}
    found |= {f"server.{name}": vars(config.server)[name] for name in _SERVER}
    settings = settings_of(config.algorithm.settings)
    found |= {f"algorithm.{name}": value for name, value in settings.items()}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def with_numbers(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Returns the settings with these numbers, which may be traced."""
    top, server, settings = {}, {}, {}
    for name, value in values.items():
        part, _, own = name.rpartition(".")
        {"": top, "server": server, "algorithm": settings}[part][own] = value
    own = dataclasses.replace(config.algorithm.settings, **settings)
    algorithm = dataclasses.replace(config.algorithm, settings=own)
    return dataclasses.replace(
        config, **top, server=dataclasses.replace(config.server, **server), algorithm=algorithm
    )


# --- which runs share a program -----------------------------------------------------------------


class Block(NamedTuple):
    """Runs that share one program.

    Attributes:
      runs: The runs.
      traced: Names of the numbers that vary along the axis of runs.
      loaded: The data of one of the runs, for shapes and names.
      arrays: Leaves of the federation's arrays. Leaves that differ between seeds have a leading
        axis of seeds.
      by_seed: For each leaf, whether it has the axis of seeds.
      structure: The tree structure of the leaves.
      seeds: The seeds along that axis.
      sources: The sources that were read, by seed.
      left_out: The number of unusable examples, private and public, by seed.
    """

    runs: list[Run]
    traced: tuple[str, ...]
    loaded: Loaded
    arrays: list[np.ndarray]
    by_seed: list[bool]
    structure: PyTree
    seeds: list[int]
    sources: dict[int, JsonObject]
    left_out: dict[int, int]


def blocks(runs: Sequence[Run]) -> list[Block]:
    """Groups runs by the program that they share."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        values = configs.to_dict(with_numbers(run.config, dict.fromkeys(numbers(run.config))))
        values["seed"] = None
        groups.setdefault(json.dumps(values, sort_keys=True), []).append(run)
    return [block for group in groups.values() for block in _by_shape(group)]


def _by_shape(runs: list[Run]) -> list[Block]:
    """Splits runs that differ only in numbers and seeds, where the seed changes shapes."""
    by_seed = {run.config.seed: run.config for run in runs}
    first: FederationArrays | None = None
    shapes: dict[Any, dict[int, PyTree]] = {}
    loaded: dict[int, Loaded] = {}
    widths = []
    for seed, config in by_seed.items():
        loaded[seed] = load(config)
        widths.append(_widths(federation_arrays(loaded[seed].federation)))
    width = jax.tree.map(lambda *sizes: max(sizes), *widths)
    read = {
        seed: sources(by_seed[seed], found.dataset, found.public, found.answers)
        for seed, found in loaded.items()
    }
    left_out = {
        seed: sum(len(data.left_out) for data in (found.dataset, found.public) if data is not None)
        for seed, found in loaded.items()
    }
    for seed, found in loaded.items():
        arrays = jax.tree.map(np.asarray, _padded(federation_arrays(found.federation), width))
        # Equal arrays are kept only once: real images are the same for every seed.
        first = arrays if first is None else first
        arrays = _shared_with(first, arrays)
        key = json.dumps(
            [
                [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(arrays)],
                num_clients(found.federation),
                found.dataset.label_names,
            ]
        )
        shapes.setdefault(key, {})[seed] = arrays
    traced = tuple(
        name
        for name in numbers(runs[0].config)
        if len({numbers(run.config)[name] for run in runs}) > 1
    )
    blocks = []
    for found in shapes.values():
        seeds = list(found)
        leaves = zip(*(jax.tree.leaves(arrays) for arrays in found.values()), strict=True)
        columns = list(leaves)
        apart = [any(leaf is not column[0] for leaf in column) for column in columns]
        stacked = [
            np.stack(c) if differ else c[0] for c, differ in zip(columns, apart, strict=True)
        ]
        own = [run for run in runs if run.config.seed in found]
        structure = jax.tree.structure(found[seeds[0]])
        first_loaded = loaded[seeds[0]]
        blocks.append(
            Block(own, traced, first_loaded, stacked, apart, structure, seeds, read, left_out)
        )
    return blocks


def _shared_with(first: PyTree, arrays: PyTree) -> PyTree:
    if jax.tree.structure(first) != jax.tree.structure(arrays):
        return arrays
    return jax.tree.map(lambda a, b: a if np.array_equal(a, b) else b, first, arrays)


def _widths(arrays: FederationArrays) -> dict[str, int]:
    """Returns the widths of the index tables; for clients, the maximum over all roles."""
    tables = [group["train"] for group in arrays.groups.values()]
    return {
        "clients": max(table.index.shape[1] for table in tables),
        "pooled": len(arrays.pooled.index),
    }


def _padded(arrays: FederationArrays, width: Mapping[str, int]) -> FederationArrays:
    """Pads the index tables to the widths over all seeds, so that one program takes them all."""

    def pad(table: PyTree, to: int) -> PyTree:
        missing = to - table.index.shape[-1]
        padding = [(0, 0)] * (table.index.ndim - 1) + [(0, missing)]
        return table._replace(index=jnp.pad(table.index, padding))

    groups = {
        role: {
            name: value if name == "ids" else pad(value, width["clients"])
            for name, value in group.items()
        }
        for role, group in arrays.groups.items()
    }
    return arrays._replace(groups=groups, pooled=pad(arrays.pooled, width["pooled"]))
