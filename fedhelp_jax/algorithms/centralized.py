"""Centralized training on all clients' data in one place, which a federation does not allow.

It is the upper reference for the federated methods. The server trains one network of each
architecture in use, for as many steps as all clients together would. Every client deploys the
network of its role (``global``).

Notes: no upload is counted, not even that of the data. The reported loss is that of the broadcast
model on a client's training data. The optimizer starts anew each round, as in all methods.
"""

import dataclasses
from collections.abc import Mapping

import jax

from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    ServerData,
    Setup,
    init_shared,
)
from fedhelp_jax.algorithms.client import Batch, Info, Updated, run_epochs
from fedhelp_jax.algorithms.local_training import (
    broadcast_client,
    supervised_loss,
    train_locally,
)
from fedhelp_jax.algorithms.method import AVERAGING, method
from fedhelp_jax.core.random import Purpose, for_purpose
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.typing import Upload


@dataclasses.dataclass(frozen=True)
class CentralizedSettings:
    """Centralized training has no settings of its own."""


@method(CentralizedSettings, pools_data=True, unused=AVERAGING)
def centralized(setup: Setup, settings: CentralizedSettings) -> FederatedAlgorithm:
    """Centralized training on everyone's data; not federated."""
    del settings

    def client(role: str) -> ClientAlgorithm:
        model = setup.models[role]

        def update(key: jax.Array, download: Variables, state: tuple, data: ClientData) -> Updated:
            del state

            def step(carry: None, batch: Batch, _: jax.Array) -> tuple[None, Info]:
                stats = download["batch_stats"]
                loss = supervised_loss(setup, model, stats, batch)(download["params"])[0]
                return carry, {"loss": loss}

            _, info = run_epochs(
                step,
                None,
                data,
                for_purpose(key, Purpose.PRIVATE_BATCHES),
                batch_size=setup.batch_size,
                local_epochs=1,
            )
            return (), None, info

        return broadcast_client(model, update)

    def aggregate(
        state: dict[str, Variables],
        uploads: Mapping[str, Upload],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> dict[str, Variables]:
        del weights
        pooled = data.pooled
        assert pooled is not None, "nobody holds all clients' data"
        trained = {
            role: train_locally(setup, setup.models[role], data.key, state[role], pooled)[0]
            for role in uploads
        }
        return {**state, **trained}

    return FederatedAlgorithm(
        init=lambda run_key: {role: init_shared(setup, run_key, role) for role in ROLES},
        download=lambda state, role: state[role],
        clients={role: client(role) for role in ROLES},
        aggregate=aggregate,
        server_trains=True,
    )
