"""FedProto.

Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022,
arXiv:2105.00243, algorithm 1. No weights are exchanged, only mean features of each class. On a
batch, a client minimises, with z the features of x,

    CE(head(z), y) + lambda |z - P_y|^2 / D

It then sends its own class means P_ic, and the server averages them, weighted by the number of
examples n_ic behind each:

    P_c <- sum_i n_ic P_ic / sum_i n_ic

Every client trains and deploys its role's own architecture.

Notes: the distance to P_y counts only once some client has sent P_y, so not in the first round. A
class that no client sends again keeps its prototype. The mean is the paper's equation 6 without its
additional factor 1/|N_c|, which would shrink prototypes. Class means are computed after local
training, in evaluation mode. The paper writes the distance between class means; here, as in the
authors' code, it is the distance of each example. For masks, each position of the feature map is an
example, which several classes share at borders. All clients need features of the same width.
``lam = 0`` is local training.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    ServerData,
    Setup,
    check_one_head,
)
from fedhelp_jax.algorithms.client import Batch, Updated
from fedhelp_jax.algorithms.local_training import private_client, train_locally
from fedhelp_jax.algorithms.method import AVERAGING, method
from fedhelp_jax.algorithms.prototypes import (
    Prototypes,
    class_means,
    gathered,
    mean_prototypes,
    members_of,
    no_prototypes,
)
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.losses import masked_mean
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.settings import at_least, setting


@dataclasses.dataclass(frozen=True)
class FedProtoSettings:
    """Settings of FedProto."""

    lam: float = setting(
        1.0, "weight of the distance to the prototypes (lambda); 0 is local training", at_least(0)
    )


@method(FedProtoSettings, unused=AVERAGING)
def fedproto(setup: Setup, settings: FedProtoSettings) -> FederatedAlgorithm:
    """FedProto: clients share class means of features (prototypes).

    Raises:
      UserError: If the architectures' features differ in width.
    """
    check_one_head(setup, "fedproto")

    def client(role: str) -> ClientAlgorithm:
        model = setup.models[role]

        def update(
            key: jax.Array, download: Prototypes, state: Variables, data: ClientData
        ) -> Updated:
            loss = functools.partial(prototype_loss, prototypes=download, lam=settings.lam)
            state, info = train_locally(setup, model, key, state, data, loss=loss)
            return state, class_means(setup, model, state, data), info

        return private_client(setup, role, update)

    def aggregate(
        state: Prototypes,
        uploads: Mapping[str, Prototypes],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> Prototypes:
        del data
        means, counts = mean_prototypes(gathered(uploads, weights))
        known = counts > 0
        return Prototypes(
            jnp.where(known[:, None], means, state.means), jnp.where(known, counts, state.counts)
        )

    return FederatedAlgorithm(
        init=lambda run_key: no_prototypes(setup),
        download=lambda server_state, role: server_state,
        clients={role: client(role) for role in ROLES},
        aggregate=aggregate,
    )


def prototype_loss(
    setup: Setup,
    model: Model,
    batch_stats: Variables,
    batch: Batch,
    *,
    prototypes: Prototypes,
    lam: float,
) -> Callable[[Variables], tuple[jax.Array, tuple[jax.Array, Variables]]]:
    """Returns the supervised loss plus the distance to prototypes.

    It replaces :func:`~fedhelp_jax.algorithms.local_training.supervised_loss`.
    """

    def loss_fn(params: Variables) -> tuple[jax.Array, tuple[jax.Array, Variables]]:
        variables = {"params": params, "batch_stats": batch_stats}
        features, stats = model.features(variables, batch.images, train=True, mask=batch.mask)
        logits = model.head(params["head"], features)
        supervised = setup.task.loss(logits, batch.targets, where=batch.mask)

        members = members_of(setup, batch, features) * (prototypes.counts > 0)
        share = jnp.sum(members, axis=-1)  # 0 where no prototype is known
        target = members @ prototypes.means / jnp.where(share > 0, share, 1)[..., None]
        distance = share * jnp.mean(jnp.square(features - target), axis=-1)
        distance = jnp.mean(distance.reshape(len(distance), -1), axis=-1)
        return masked_mean(supervised + lam * distance, batch.mask), (logits, stats)

    return loss_fn
