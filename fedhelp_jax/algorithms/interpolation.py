"""Models between a client's own network and the one that the server broadcasts.

    w(a) = (1 - a) w_personal + a w_global        also of the statistics of normalisation layers

What is best to deploy may lie between both (Wortsman et al., "Robust fine-tuning of zero-shot
models", CVPR 2022). Training is as before; the further models are only evaluated.
"""

from collections.abc import Sequence
from typing import Any

import jax

from fedhelp_jax.algorithms.base import ClientAlgorithm, FederatedAlgorithm
from fedhelp_jax.core.names import BETWEEN
from fedhelp_jax.models.model import Variables

# The models between which there are others.
_ENDS = ("personal", "global")


def with_interpolated(algorithm: FederatedAlgorithm, parts: Sequence[float]) -> FederatedAlgorithm:
    """Returns a method whose clients could deploy further models.

    Args:
      algorithm: The method. Clients without a personal and a broadcast model of one architecture
        stay as they are.
      parts: For each further model, the part ``a`` of the broadcast one in it, within (0, 1).
    """
    clients = {role: _between(client, parts) for role, client in algorithm.clients.items()}
    return algorithm._replace(clients=clients)


def _between(client: ClientAlgorithm, parts: Sequence[float]) -> ClientAlgorithm:
    own, broadcast = (client.models.get(name) for name in _ENDS)
    if not parts or own is None or own is not broadcast:
        return client
    names = {f"{BETWEEN}{part:g}": part for part in parts}

    def deploy(download: Any, state: Any, data: Any) -> dict[str, Variables]:
        deployed = client.deploy(download, state, data)
        own, broadcast = (deployed[name] for name in _ENDS)
        mixed = {
            name: jax.tree.map(lambda x, y, a=part: (1 - a) * x + a * y, own, broadcast)
            for name, part in names.items()
        }
        return deployed | mixed

    return client._replace(models={**client.models, **dict.fromkeys(names, own)}, deploy=deploy)
