"""FedNCM.

Legate et al., "Guiding The Last Layer in Federated Learning with Pre-Trained Models", NeurIPS 2023,
arXiv:2306.03937, sec. 3. Nothing is trained. On the answers x of a foundation model about the
clients' own images, with n_ic the number of images of class c at client i:

    client:  mu_ic = mean of x over its images of class c
    server:  mu_c = sum_i n_ic mu_ic / sum_i n_ic
    class of an image: the c with the nearest mu_c

Logits are ``mu_c x - |mu_c|^2 / 2``, which differ from ``-|x - mu_c|^2 / 2`` by a constant.

Notes: one round is enough, and further ones repeat it. x is standardised over its own values. A
class of which no client has an image is never answered. As `foundation_probe`, it needs a model
that runs at the clients.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import FederatedAlgorithm, ServerData, Setup
from fedhelp_jax.algorithms.client import Updated
from fedhelp_jax.algorithms.linear_probe import (
    NO_NETWORK,
    NO_STEPS,
    loss_only,
    shared_linear_model,
    with_model,
)
from fedhelp_jax.algorithms.local_training import broadcast_client
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.algorithms.prototypes import (
    Prototypes,
    class_means,
    gathered,
    mean_prototypes,
)
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables

# Far below all logits, but finite.
_NEVER = -1e6


@dataclasses.dataclass(frozen=True)
class FedNCMSettings:
    """FedNCM has no settings of its own."""


@method(FedNCMSettings, reads_answers=True, unused=(*NO_NETWORK, *NO_STEPS))
def fedncm(setup: Setup, settings: FedNCMSettings) -> FederatedAlgorithm:
    """FedNCM: nearest class mean of a foundation model that runs at the clients.

    Raises:
      UserError: If the run is about masks.
    """
    del settings
    model = shared_linear_model(setup.num_classes)
    setup = with_model(setup, model, "fedncm")

    def update(key: jax.Array, download: Variables, state: tuple, data: ClientData) -> Updated:
        del key, state
        upload = class_means(setup, model, download, data)
        return (), upload, loss_only(setup, model, download, data)

    def aggregate(
        state: Variables,
        uploads: Mapping[str, Prototypes],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> Variables:
        del data
        means, counts = mean_prototypes(gathered(uploads, weights))
        bias = jnp.where(counts > 0, -0.5 * jnp.sum(means**2, axis=-1), _NEVER)
        head = {"kernel": means.T, "bias": bias}
        return {**state, "params": {**state["params"], "head": head}}

    return FederatedAlgorithm(
        init=lambda run_key: model.init(run_key, setup.sample_shape),
        download=lambda state, role: state,
        clients=dict.fromkeys(ROLES, broadcast_client(model, update)),
        aggregate=aggregate,
    )
