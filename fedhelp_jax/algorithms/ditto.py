"""Ditto.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
arXiv:2012.04221, algorithm 1. The server's ``w`` is that of FedAvg. In addition, every client keeps
a ``v_i`` that minimises

    h_i(v_i; w) = F_i(v_i) + lambda/2 |v_i - w|^2

A client deploys its ``v_i`` (``personal``).

Notes: ``v_i`` takes as many steps as ``w``, on the same batches, with the received ``w`` as the
anchor. The gradient of the term is added before Adam. ``lam = 0`` is local training of the small
architecture.
"""

import dataclasses

import jax
import optax

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.client import Updated
from fedhelp_jax.algorithms.local_training import personal_client, proximal, train_locally
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import at_least, setting


@dataclasses.dataclass(frozen=True)
class DittoSettings:
    """Settings of Ditto."""

    lam: float = setting(
        1.0,
        "weight of the distance to the broadcast model (lambda); 0 is local training",
        at_least(0),
    )


@method(DittoSettings, unused=LARGE_NETWORK)
def ditto(setup: Setup, settings: DittoSettings) -> FederatedAlgorithm:
    """Ditto: FedAvg plus a personal model kept near the global one."""
    model = setup.models["small"]

    def update(key: jax.Array, w: Variables, v: Variables, data: ClientData) -> Updated:
        upload, _ = train_locally(setup, model, key, w, data)
        tx = optax.chain(proximal(settings.lam, w["params"]), setup.tx)
        v, info = train_locally(setup, model, key, v, data, tx=tx)
        return v, upload, info

    return averaging(setup, dict.fromkeys(ROLES, personal_client(setup, update)))
