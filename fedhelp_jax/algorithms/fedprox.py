"""FedProx.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127,
algorithm 2. Starting from ``w``, every client minimises

    h_i(w_i) = F_i(w_i) + mu/2 |w_i - w|^2

and the server averages as in FedAvg.

Notes: the gradient of the term, ``mu (w_i - w)``, is added before Adam, like weight decay. The
paper tunes mu between 0.001 and 1. ``mu = 0`` is FedAvg.
"""

import dataclasses

import jax
import optax

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.client import Info
from fedhelp_jax.algorithms.local_training import proximal, train_locally, training_client
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import at_least, setting


@dataclasses.dataclass(frozen=True)
class FedProxSettings:
    """Settings of FedProx."""

    mu: float = setting(0.1, "weight of the proximal term; 0 is FedAvg", at_least(0))
    personal: bool = setting(True, "as in FedAvg")


@method(FedProxSettings, unused=LARGE_NETWORK)
def fedprox(setup: Setup, settings: FedProxSettings) -> FederatedAlgorithm:
    """FedProx: FedAvg with a proximal term towards the global model."""

    def train(key: jax.Array, w: Variables, data: ClientData) -> tuple[Variables, Info]:
        tx = optax.chain(proximal(settings.mu, w["params"]), setup.tx)
        return train_locally(setup, setup.models["small"], key, w, data, tx=tx)

    client = training_client(setup, train, personal=settings.personal)
    return averaging(setup, dict.fromkeys(ROLES, client))
