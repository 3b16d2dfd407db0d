"""Runs a function of one client over many: vectorised, in chunks, over devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedhelp_jax.core.compilation import traced_once
from fedhelp_jax.core.tree import zeros_of
from fedhelp_jax.typing import PyTree

_AXIS = "clients"
_EVERYWHERE = P()


class Mapping(NamedTuple):
    """How clients are mapped to devices.

    Attributes:
      mesh: Devices along the axis ``clients``.
      chunk_size: How many clients of a device are vectorised at a time; 0 means all of them.
      private: Whether a device holds the examples and states of its own clients only. Every client
        then has a slot of its own in every round, and rounds do not move its data or state.
    """

    mesh: Mesh
    chunk_size: int
    private: bool = False

    @property
    def num_devices(self) -> int:
        """The number of devices that the clients are spread over."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """The back end of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def slots(self, clients: int) -> int:
        """Rounds a number of clients up, so that every device has whole chunks."""
        each = -(-clients // self.num_devices)
        chunk = min(self.chunk_size or each, each)
        return self.num_devices * chunk * -(-each // chunk)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds in full."""
        return NamedSharding(self.mesh, P())

    @property
    def by_client(self) -> NamedSharding:
        """The sharding of arrays with a leading axis of clients."""
        return NamedSharding(self.mesh, P(_AXIS))

    @property
    def own(self) -> P:
        """The partitioning of the clients' data and states between rounds."""
        return P(_AXIS) if self.private else P()


def make_mapping(
    chunk_size: int | None = None,
    num_devices: int | None = None,
    *,
    private: bool | None = None,
    local: bool = False,
) -> Mapping:
    """Returns a mapping over the first ``num_devices`` devices of the default back end.

    Args:
      chunk_size: Clients vectorised at a time on a device. None takes the back end's default: 1 on
        CPU, where a second client only pushes the first one's activations out of the cache, and 0
        (all) on accelerators.
      num_devices: None takes all devices, including those of other processes.
      private: As in `Mapping`; None means True if there are several processes, unless ``local``.
      local: Whether to take only this process's own devices.

    Returns:
      The mapping.
    """
    devices = (jax.local_devices() if local else jax.devices())[:num_devices]
    if chunk_size is None:
        chunk_size = 1 if devices[0].platform == "cpu" else 0
    if private is None:
        private = jax.process_count() > 1 and not local
    return Mapping(Mesh(np.array(devices), (_AXIS,)), chunk_size, private)


def over_clients(
    fn: Callable[[Any, Any], Any], mapping: Mapping, placed: Any = _EVERYWHERE
) -> Callable[[PyTree, PyTree], PyTree]:
    """Turns ``fn(shared, one)`` into ``(shared, stacked) -> stacked results``, for use in ``jit``.

    Args:
      fn: A pure function of what all clients share and of one client's own tree.
      mapping: How to run it.
      placed: The partitioning of the shared tree, as a prefix of it; each device sees its own part.

    Returns:
      A function whose second argument has leaves ``[K, ...]``, where ``K`` comes from
      ``mapping.slots``.
    """

    def without_sum(shared: PyTree, one: PyTree) -> PyTree:
        return fn(shared, one), ()

    run = _over_devices(without_sum, mapping, placed)
    return lambda shared, stacked: run(shared, stacked, None)[0]


def of_one_client(
    fn: Callable[[Any, Any], jax.Array], mapping: Mapping, placed: Any = _EVERYWHERE
) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
    """Like :func:`over_clients`, but for one client alone, on the device that holds it.

    Args:
      fn: A pure function of what all clients share and of one client's own tree.
      mapping: How to run it.
      placed: As in :func:`over_clients`.

    Returns:
      A function ``(shared, stacked, row) -> [D, ...]``, with zeros on all devices but the client's.
    """

    def on_one_device(shared: PyTree, stacked: PyTree, row: jax.Array) -> jax.Array:
        clients = jax.tree.leaves(stacked)[0].shape[0]
        place = row - lax.axis_index(_AXIS) * clients
        own = jax.tree.map(lambda leaf: leaf[jnp.clip(place, 0, clients - 1)], stacked)
        shape = jax.eval_shape(fn, shared, own)
        nothing = jnp.zeros(shape.shape, shape.dtype)
        mine = (place >= 0) & (place < clients)
        return lax.cond(mine, lambda: fn(shared, own), lambda: nothing)[None]

    return jax.shard_map(
        on_one_device,
        mesh=mapping.mesh,
        in_specs=(placed, P(_AXIS), P()),
        out_specs=P(_AXIS),
        check_vma=False,
    )


def sum_over_clients(
    fn: Callable[[PyTree, PyTree], tuple[PyTree, PyTree, jax.Array]],
    mapping: Mapping,
    placed: Any = _EVERYWHERE,
) -> Callable[..., tuple[PyTree, tuple[PyTree, jax.Array]]]:
    """Like :func:`over_clients`, but reduces part of the results to a weighted sum per device.

    The sum is accumulated while clients run, so that at most one chunk of terms is in memory.

    Args:
      fn: ``(shared, one) -> (result, summed, counts)``. If the boolean ``counts`` is False, the
        client's weight is set to 0.
      mapping: How to run it.
      placed: As in :func:`over_clients`.

    Returns:
      A function ``(shared, stacked, weights [K], begun=None) -> (stacked results, (sums [D, ...],
      totals [D]))`` over D devices. Clients of weight 0 do not affect the sums, even if their
      results are not finite. ``begun`` holds the sums and totals of other clients, to which these
      are added.
    """

    def weighted(shared: PyTree, one: tuple[PyTree, jax.Array]) -> PyTree:
        own, weight = one
        result, summed, counts = fn(shared, own)
        weight = jnp.where(counts, weight, 0)

        def scaled(leaf: jax.Array) -> jax.Array:
            return jnp.where(weight > 0, leaf * weight.astype(leaf.dtype), 0)

        return result, (jax.tree.map(scaled, summed), weight)

    def run(shared: PyTree, stacked: PyTree, weights: jax.Array, begun: PyTree = None) -> PyTree:
        return _over_devices(weighted, mapping, placed)(shared, (stacked, weights), begun)

    return run


def fill(mapping: Mapping, stacked: PyTree, place: jax.Array, rows: PyTree) -> PyTree:
    """Writes the results of some clients into stacked results, on each device separately.

    Args:
      mapping: The mapping, which names the devices.
      stacked: Leaves ``[K, ...]``.
      place: ``[M]`` positions of the rows among those of their device; empty slots lie past the
        end.
      rows: Leaves ``[M, ...]``.

    Returns:
      Leaves ``[K, ...]``.
    """

    def on_one_device(stacked: PyTree, place: jax.Array, rows: PyTree) -> PyTree:
        return jax.tree.map(lambda old, new: old.at[place].set(new, mode="drop"), stacked, rows)

    return _on_each(on_one_device, mapping, (P(_AXIS), P(_AXIS), P(_AXIS)))(stacked, place, rows)


def _over_devices(fn: Callable[[Any, Any], tuple[Any, Any]], mapping: Mapping, placed: Any) -> Any:
    """Returns ``(shared, stacked, begun) -> (stacked results, sums [D, ...])``.

    ``fn`` returns a result to stack and one to sum.
    """

    def on_one_device(shared: PyTree, stacked: PyTree, begun: PyTree) -> PyTree:
        begun = jax.tree.map(lambda leaf: leaf[0], begun)
        clients = jax.tree.leaves(stacked)[0].shape[0]
        chunk = min(mapping.chunk_size or clients, clients)

        # Its results' shapes are needed first where chunks follow each other.
        @traced_once
        def one_chunk(part: PyTree) -> PyTree:
            # No vmap over an axis of one: it would change the convolutions.
            if chunk == 1:
                return fn(shared, part)
            results, summed = jax.vmap(lambda one: fn(shared, one))(part)
            return results, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), summed)

        def add(sums: PyTree, part: PyTree) -> PyTree:
            results, summed = one_chunk(part)
            return jax.tree.map(jnp.add, sums, summed), results

        if chunk == clients > 1:
            results, sums = one_chunk(stacked)
            if begun is not None:
                sums = jax.tree.map(jnp.add, begun, sums)
        else:
            shape = (-1,) if chunk == 1 else (-1, chunk)
            parts = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), stacked)
            if begun is None:
                first = jax.tree.map(lambda leaf: leaf[0], parts)
                begun = zeros_of(jax.eval_shape(one_chunk, first)[1])
            sums, results = lax.scan(add, begun, parts)
            if chunk > 1:
                results = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)
        return results, jax.tree.map(lambda leaf: leaf[None], sums)

    return _on_each(on_one_device, mapping, (placed, P(_AXIS), P(_AXIS)))


def _on_each(fn: Callable[..., Any], mapping: Mapping, placed: tuple[Any, ...]) -> Any:
    """Runs ``fn`` on each device separately, on its shard of the arguments."""
    if mapping.num_devices == 1:
        return fn
    return jax.shard_map(
        fn, mesh=mapping.mesh, in_specs=placed, out_specs=P(_AXIS), check_vma=False
    )
