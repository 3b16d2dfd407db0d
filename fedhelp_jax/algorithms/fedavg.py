"""FedAvg.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017, arXiv:1602.05629, algorithm 1:

    w <- sum_i a_i w_i,  w_i = w after local epochs on client i

One architecture, the small one, on every client. The broadcast model is what it deploys
(``global``); a client's copy after its local training is reported beside it (``personal``), as
fine-tuned FedAvg.

Notes: batch statistics are averaged like parameters.
"""

from typing import Any, NamedTuple

import jax

from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    Setup,
    init_shared,
    mean_of_uploads,
    train_locally,
)
from fedhelp_jax.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables


class FedAvgSettings(NamedTuple):
    """FedAvg has no settings of its own."""


def fedavg(setup: Setup, settings: FedAvgSettings) -> FederatedAlgorithm:
    """FedAvg on the small architecture."""
    del settings
    model = setup.models["small"]

    def client_init(run_key: jax.Array, client_id: jax.Array) -> Variables:
        del client_id
        return init_shared(setup, run_key)

    def update(key: jax.Array, download: Variables, state: Variables, data: ClientData) -> Any:
        del state
        variables, info = train_locally(setup, model, key, download, data)
        return variables, variables, info

    def deploy(download: Variables, state: Variables) -> dict[str, Variables]:
        return {"global": download, "personal": state}

    client = ClientAlgorithm({"global": model, "personal": model}, client_init, update, deploy)
    return FederatedAlgorithm(
        init=lambda run_key: init_shared(setup, run_key),
        download=lambda server_state: server_state,
        clients=dict.fromkeys(ROLES, client),
        aggregate=mean_of_uploads,
    )
