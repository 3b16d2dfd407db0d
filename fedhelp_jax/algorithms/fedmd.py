"""FedMD.

Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", NeurIPS 2019
workshop, arXiv:1910.03581, algorithm 1. No weights are exchanged, only logits on the public images
x_p. In every round, a client i, with a network f_i of its role's architecture,

    digests:   towards the consensus, mean |f_i(x_p) - consensus(x_p)|, digest_epochs over all x_p
    revisits:  local epochs of CE on its private data
    sends:     f_i(x_p) for all x_p

and the server takes the mean, ``consensus <- mean_i f_i(x_p)``.

Notes: there is nothing to digest in the first round. The paper first trains every network on the
public labels; here these are another label space, and what clients have in common is the private
head. Logits are compared by their absolute difference, as in the authors' code. Public images are
digested in evaluation mode, in which their logits are also computed (see ``on_public``). A
foundation model's answers are not used, because they are over other classes. An epoch is
``ceil(P / B)`` batches in one order, and the last batch is filled up from the start of the order;
the authors draw a subset of the images each round. ``digest_epochs = 0`` is local training.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    ServerData,
    Setup,
)
from fedhelp_jax.algorithms.client import Updated
from fedhelp_jax.algorithms.local_training import private_client, train_locally
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.algorithms.on_public import (
    check_public,
    learn_answers,
    no_logits,
    public_logits,
)
from fedhelp_jax.core.tree import weighted_mean
from fedhelp_jax.data.federation import ROLES, ClientData, PublicPool
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import setting, whole


@dataclasses.dataclass(frozen=True)
class FedMDSettings:
    """Settings of FedMD."""

    digest_epochs: int = setting(
        1,
        "passes over the public images towards the consensus each round; 0 is local training",
        whole(0),
    )


class Consensus(NamedTuple):
    """Mean logits ``[P, ...]`` on the public images, and whether there are any yet."""

    logits: jax.Array
    known: jax.Array


@method(FedMDSettings, uses_public=True, unused=("server",))
def fedmd(setup: Setup, settings: FedMDSettings) -> FederatedAlgorithm:
    """FedMD: clients learn the mean prediction on public images.

    Raises:
      UserError: Without public images.
    """
    num_images = check_public(setup, "fedmd").num_images
    steps = settings.digest_epochs * -(-num_images // setup.public_batch_size)

    def client(role: str) -> ClientAlgorithm:
        model = setup.models[role]

        def update(
            key: jax.Array, download: Consensus, state: Variables, data: ClientData
        ) -> Updated:
            public = data.public
            assert public is not None
            # Skip if there is no consensus yet, or in an empty slot.
            digesting = jnp.where(download.known & (data.size > 0), steps, 0)
            state = learn_answers(
                setup,
                model,
                key,
                state,
                PublicPool(public.images, None, download.logits),
                digesting,
                absolute_difference,
            )
            state, info = train_locally(setup, model, key, state, data)
            return state, public_logits(setup, model, state, public), info

        return private_client(setup, role, update)

    def aggregate(
        state: Consensus,
        uploads: Mapping[str, jax.Array],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> Consensus:
        del state, data
        return Consensus(
            weighted_mean(list(uploads.values()), list(weights.values())), jnp.array(True)
        )

    return FederatedAlgorithm(
        init=lambda run_key: Consensus(no_logits(setup), jnp.array(False)),
        download=lambda server_state, role: server_state,
        clients={role: client(role) for role in ROLES},
        aggregate=aggregate,
    )


def absolute_difference(logits: jax.Array, answers: jax.Array) -> jax.Array:
    """Returns the mean absolute difference over all logits of an image, ``[B]``."""
    return jnp.mean(jnp.abs(logits - answers).reshape(len(logits), -1), axis=-1)
