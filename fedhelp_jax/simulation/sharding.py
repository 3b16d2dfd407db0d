"""Puts a federation on devices: replicated, or each device with only its own clients' data."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding

from fedhelp_jax.data.federation import SPLITS, ClientIndex, Federation
from fedhelp_jax.simulation.round import FederationArrays, federation_arrays
from fedhelp_jax.simulation.vectorize import Mapping
from fedhelp_jax.typing import PyTree


def place(federation: Federation, mapping: Mapping) -> FederationArrays:
    """Puts the arrays of a federation on the devices of a mapping.

    Args:
      federation: The data. If the mapping is private, they must be on the host: no device then
        receives another device's part of the pool or of the tables.
      mapping: The mapping, which names the devices.

    Returns:
      The arrays.
    """
    arrays = federation_arrays(federation)
    if not mapping.private:
        return jax.device_put(arrays, mapping.replicated)
    rows = {role: mapping.slots(len(tables["ids"])) for role, tables in arrays.groups.items()}
    padded = {
        role: jax.tree.map(lambda leaf, n=rows[role]: _padded(leaf, n), tables)
        for role, tables in arrays.groups.items()
    }
    owned = _owned(padded, mapping.num_devices)
    length = max(1, *(len(examples) for examples in owned))

    def part_of(leaf: PyTree) -> Callable[[PyTree], np.ndarray]:
        def of_one_device(where: PyTree) -> np.ndarray:
            examples = owned[(where[0].start or 0) // length]
            return _padded(np.asarray(leaf)[examples], length)

        return of_one_device

    pool = jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            (mapping.num_devices * length, *leaf.shape[1:]), mapping.by_client, part_of(leaf)
        ),
        arrays.pool,
    )
    groups = {
        role: {"ids": put(tables["ids"], mapping.replicated)}
        | {s: put(_renumbered(tables[s], owned), mapping.by_client) for s in SPLITS}
        for role, tables in padded.items()
    }
    return FederationArrays(pool, put(arrays.public, mapping.replicated), groups, None)


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Puts a tree that every process has in full on all devices, without communication."""

    def one(leaf: PyTree) -> jax.Array:
        leaf = np.asarray(leaf)
        leaf = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda where: leaf[where])

    return jax.tree.map(one, tree)


def shapes_on(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Returns the shapes that the arrays of a tree, or their shapes, have with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding), tree
    )


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes that arrays, or their shapes and shardings, take on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _padded(leaf: PyTree, length: int) -> np.ndarray:
    leaf = np.asarray(leaf)
    return np.pad(leaf, [(0, length - len(leaf))] + [(0, 0)] * (leaf.ndim - 1))


def _owned(groups: PyTree, devices: int) -> list[np.ndarray]:
    """Returns the examples of each device's clients, ascending."""
    found: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in range(devices)]
    for tables in groups.values():
        for split in SPLITS:
            index, size = tables[split]
            for row, (examples, n) in enumerate(zip(index, size, strict=True)):
                found[row * devices // len(index)].append(examples[:n])
    return [np.unique(np.concatenate(parts)) for parts in found]


def _renumbered(table: ClientIndex, owned: list[np.ndarray]) -> ClientIndex:
    """Renumbers a table to index each device's own examples; rows are padded with 0."""
    index: PyTree = np.zeros_like(table.index)
    for row, (examples, n) in enumerate(zip(table.index, table.size, strict=True)):
        index[row, :n] = np.searchsorted(owned[row * len(owned) // len(index)], examples[:n])
    return table._replace(index=index)
