"""How a function of one client runs over many: vectorised, in chunks, over devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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
      A function whose second argument has leaves ``[K, ...]``, ``K`` a multiple of the number of
      devices.
    """

    def on_one_device(shared: Any, stacked: Any) -> Any:
        if mapping.chunk_size == 0:
            return jax.vmap(lambda one: fn(shared, one))(stacked)
        # batch_size=1 would still vmap over an axis of one, and with it change the convolutions.
        batch_size = mapping.chunk_size if mapping.chunk_size > 1 else None
        return lax.map(lambda one: fn(shared, one), stacked, batch_size=batch_size)

    if mapping.num_devices == 1:
        return on_one_device
    return jax.shard_map(
        on_one_device,
        mesh=mapping.mesh,
        in_specs=(P(), P(_AXIS)),
        out_specs=P(_AXIS),
        check_vma=False,
    )
