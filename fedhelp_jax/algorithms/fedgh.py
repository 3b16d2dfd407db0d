"""FedGH.

Yi et al., "FedGH: Heterogeneous Federated Learning with Generalized Global Header", ACM MM 2023,
arXiv:2303.13137, algorithm 1. Clients share a head, but not the feature extractor before it:

    client:  its head <- the server's; local epochs of CE; sends mean features P_ic of each class
    server:  head <- head - eta sum_ic grad CE(head(P_ic), c)

Every client trains and deploys its role's own architecture.

Notes: the server uses all P_ic in one step, while the paper takes them one by one. eta is
``server_learning_rate``, and a round takes ``server_epochs`` such steps. Class means are computed
after local training, in evaluation mode; for masks, each position of the feature map is an example.
A client deploys the model after local training, including its head. All clients need features of
the same width.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    ServerData,
    Setup,
    check_one_head,
    init_shared,
)
from fedhelp_jax.algorithms.client import Updated, apply_gradient, sgd_l2
from fedhelp_jax.algorithms.local_training import private_client, train_locally
from fedhelp_jax.algorithms.method import AVERAGING, method
from fedhelp_jax.algorithms.prototypes import Prototypes, class_means, gathered
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.losses import cross_entropy_loss
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import more_than, setting, whole
from fedhelp_jax.typing import Download, Params


@dataclasses.dataclass(frozen=True)
class FedGHSettings:
    """Settings of FedGH."""

    server_epochs: int = setting(
        1, "steps of the server's head on all class means of a round", whole(0)
    )
    server_learning_rate: float = setting(
        0.01, "of these steps, plain SGD (eta); it follows the clients' schedule", more_than(0)
    )


@method(FedGHSettings, unused=AVERAGING)
def fedgh(setup: Setup, settings: FedGHSettings) -> FederatedAlgorithm:
    """FedGH: the server trains a shared head on class means of features.

    Raises:
      UserError: If the architectures' features differ in width.
    """
    check_one_head(setup, "fedgh")

    def client(role: str) -> ClientAlgorithm:
        model = setup.models[role]

        def update(
            key: jax.Array, download: Download, state: Variables, data: ClientData
        ) -> Updated:
            state = {**state, "params": {**state["params"], "head": download}}
            state, info = train_locally(setup, model, key, state, data)
            return state, class_means(setup, model, state, data), info

        return private_client(setup, role, update)

    def aggregate(
        head: Params,
        uploads: Mapping[str, Prototypes],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> Params:
        del data
        sent = gathered(uploads, weights)
        clients, classes, width = sent.means.shape
        means = sent.means.reshape(-1, width)
        labels = jnp.tile(jnp.arange(classes), clients)

        def loss(head: Params) -> jax.Array:
            logits = setup.task.class_logits(setup.task.head(head, means))
            values = cross_entropy_loss(logits, labels)
            return jnp.sum(jnp.where(sent.counts.reshape(-1) > 0, values, 0))

        tx = sgd_l2(settings.server_learning_rate * setup.schedule, setup.weight_decay)
        return jax.lax.fori_loop(
            0,
            settings.server_epochs,
            lambda _, head: apply_gradient(tx, head, jax.grad(loss)(head)),
            head,
        )

    return FederatedAlgorithm(
        init=lambda run_key: init_shared(setup, run_key)["params"]["head"],
        download=lambda head, role: head,
        clients={role: client(role) for role in ROLES},
        aggregate=aggregate,
        server_trains=True,
    )
