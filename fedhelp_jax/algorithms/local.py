"""Local training: every client trains alone, without communication. It is the reference.

A small client trains the small architecture and a large one the large architecture, each from the
same initial weights as under any other method.
"""

import dataclasses

import jax

from fedhelp_jax.algorithms.base import ClientAlgorithm, FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.client import Updated
from fedhelp_jax.algorithms.local_training import private_client, train_locally
from fedhelp_jax.algorithms.method import AVERAGING, method
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class LocalSettings:
    """Settings of local training."""

    small_only: bool = setting(False, "large clients train the small architecture too")


@method(LocalSettings, unused=AVERAGING)
def local(setup: Setup, settings: LocalSettings) -> FederatedAlgorithm:
    """Local training: every client alone, on its own data."""

    def client(role: str) -> ClientAlgorithm:
        role = "small" if settings.small_only else role

        def update(key: jax.Array, download: None, state: Variables, data: ClientData) -> Updated:
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
