"""How a function of one client runs over many: vectorised, in chunks, over devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_AXIS = "clients"


class Mapping(NamedTuple):
    """How clients run.

    Attributes:
      mesh: Devices along the axis ``clients``.
      chunk_size: How many clients of a device are vectorised at a time; 0 means all of them.
    """

    mesh: Mesh
    chunk_size: int

    @property
    def num_devices(self) -> int:
        """Number of devices the clients are spread over."""
        return self.mesh.size

    def slots(self, clients: int) -> int:
        """The number of clients rounded up, so that every device has whole chunks."""
        each = -(-clients // self.num_devices)
        chunk = min(self.chunk_size or each, each)
        return self.num_devices * chunk * -(-each // chunk)

    @property
    def replicated(self) -> NamedSharding:
        """The placement of what every device holds in full."""
        return NamedSharding(self.mesh, P())

    @property
    def by_client(self) -> NamedSharding:
        """The placement of what has a leading axis of clients."""
        return NamedSharding(self.mesh, P(_AXIS))


def make_mapping(chunk_size: int | None = None, num_devices: int | None = None) -> Mapping:
    """A mapping over the first ``num_devices`` devices of the default back end.

    Args:
      chunk_size: Clients vectorised at a time on a device. None takes the back end's default: 1 on
        CPU, where a second client only pushes the first one's activations out of the cache, and 0
        (all) on accelerators.
      num_devices: None takes all.

    Returns:
      The mapping.
    """
    devices = jax.devices()[:num_devices]
    if chunk_size is None:
        chunk_size = 1 if devices[0].platform == "cpu" else 0
    return Mapping(Mesh(np.array(devices), (_AXIS,)), chunk_size)


def over_clients(fn: Callable[[Any, Any], Any], mapping: Mapping) -> Callable[[Any, Any], Any]:
    """``(shared, stacked) -> stacked results`` of ``fn(shared, one)``, for use inside ``jit``.

    Args:
      fn: A pure function of what all clients share and of one client's own tree.
      mapping: How to run it.

    Returns:
      A function whose second argument has leaves ``[K, ...]``, ``K`` one of ``mapping.slots``.
    """

    def without_sum(shared: Any, one: Any) -> Any:
        return fn(shared, one), ()

    return lambda shared, stacked: _over_devices(without_sum, mapping)(shared, stacked)[0]


def mean_over_clients(
    fn: Callable[[Any, Any], tuple[Any, Any]], mapping: Mapping
) -> Callable[[Any, Any, jax.Array], tuple[Any, Any, jax.Array]]:
    """Like :func:`over_clients`, but of a part of the results only a weighted mean per device.

    The mean is summed up while clients run, so that never more than a chunk of them is in memory.

    Args:
      fn: ``(shared, one) -> (result, averaged)``.
      mapping: How to run it.

    Returns:
      A function ``(shared, stacked, weights [K]) -> (stacked results, means [D, ...], totals
      [D])`` over D devices; clients of weight 0 count for nothing, whatever they give.
    """

    def weighted(shared: Any, one: tuple[Any, jax.Array]) -> Any:
        own, weight = one
        result, averaged = fn(shared, own)

        def scaled(leaf: jax.Array) -> jax.Array:
            return jnp.where(weight > 0, leaf * weight.astype(leaf.dtype), 0)

        return result, (jax.tree.map(scaled, averaged), weight)

    def run(shared: Any, stacked: Any, weights: jax.Array) -> Any:
        results, (sums, totals) = _over_devices(weighted, mapping)(shared, (stacked, weights))

        def mean(leaf: jax.Array) -> jax.Array:
            total = jnp.where(totals > 0, totals, 1).astype(leaf.dtype)
            return leaf / total.reshape(-1, *(1,) * (leaf.ndim - 1))

        return results, jax.tree.map(mean, sums), totals

    return run


def _over_devices(fn: Callable[[Any, Any], tuple[Any, Any]], mapping: Mapping) -> Any:
    """``(shared, stacked) -> (stacked results, sums [D, ...])`` of ``fn``'s two results."""

    def on_one_device(shared: Any, stacked: Any) -> Any:
        clients = jax.tree.leaves(stacked)[0].shape[0]
        chunk = min(mapping.chunk_size or clients, clients)

        def one_chunk(part: Any) -> Any:
            # A chunk of one is no vmap over an axis of one, which would change the convolutions.
            if chunk == 1:
                return fn(shared, part)
            results, summed = jax.vmap(lambda one: fn(shared, one))(part)
            return results, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), summed)

        def add(sums: Any, part: Any) -> Any:
            results, summed = one_chunk(part)
            return jax.tree.map(jnp.add, sums, summed), results

        if chunk == clients > 1:
            results, sums = one_chunk(stacked)
        else:
            shape = (-1,) if chunk == 1 else (-1, chunk)
            parts = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), stacked)
            first = jax.tree.map(lambda leaf: leaf[0], parts)
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one_chunk, first)[1]
            )
            sums, results = lax.scan(add, zeros, parts)
            if chunk > 1:
                results = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)
        return results, jax.tree.map(lambda leaf: leaf[None], sums)

    if mapping.num_devices == 1:
        return on_one_device
    return jax.shard_map(
        on_one_device,
        mesh=mapping.mesh,
        in_specs=(P(), P(_AXIS)),
        out_specs=P(_AXIS),
        check_vma=False,
    )
