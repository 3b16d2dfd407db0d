"""Local training: every client alone, no message to anyone; the reference for all methods.

A small client trains the small architecture, a large one the large architecture, each from the
weights it would have started from under any other method.
"""

from typing import Any, NamedTuple

import jax

from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    Setup,
    private_client,
    train_locally,
)
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.models.model import Variables


class LocalSettings(NamedTuple):
    """Settings of local training.

    Attributes:
      small_only: Large clients train the small architecture too.
    """

    small_only: bool = False


def local(setup: Setup, settings: LocalSettings) -> FederatedAlgorithm:
    """Local training of each client's own architecture."""

    def client(role: str) -> ClientAlgorithm:
        role = "small" if settings.small_only else role

        def update(key: jax.Array, download: None, state: Variables, data: ClientData) -> Any:
            del download
            variables, info = train_locally(setup, setup.models[role], key, state, data)
            return variables, None, info

        return private_client(setup, role, update)

    return FederatedAlgorithm(
        init=lambda run_key: None,
        download=lambda server_state, role: None,
        clients={"small": client("small"), "large": client("large")},
        aggregate=lambda server_state, uploads, weights, data: None,
    )
