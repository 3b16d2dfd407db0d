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

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.linear_probe import NO_NETWORK, NO_STEPS, head_of_class_means
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.algorithms.prototypes import Prototypes, mean_prototypes
from fedhelp_jax.typing import Params

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

    def make_head(head: Params, sent: Prototypes, key: jax.Array) -> Params:
        del head, key
        means, counts = mean_prototypes(sent)
        bias = jnp.where(counts > 0, -0.5 * jnp.sum(means**2, axis=-1), _NEVER)
        return {"kernel": means.T, "bias": bias}

    return head_of_class_means(setup, "fedncm", make_head)
