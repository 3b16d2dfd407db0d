"""FedPFT, federated parametric feature transfer.

Beitollahi et al., "Parametric Feature Transfer: One-shot Federated Learning with Foundation
Models", arXiv:2402.01862, sec. 4. On the answers x of a foundation model about the clients' own
images, with n_ic the number of images of class c at client i:

    client:  a Gaussian N(mu_ic, diag(v_ic)) of each of its classes
    server:  draws features of class c from N(mu_ic, diag(v_ic)), in proportion to n_ic
             min over W, b:  mean CE(W x + b, c) + l2/2 |W|^2        (L-BFGS, all draws at once)

Notes: we use one Gaussian with a diagonal covariance, the paper's mixture with K = 1, because small
hospitals have few images of a class. The number of draws, the squared weights in the loss and
L-BFGS are ours. x is standardised over its own values. One round is enough; further ones draw anew
and fit from where the last one ended. As `foundation_probe`, it needs a model that runs at the
clients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.linear_probe import (
    NO_NETWORK,
    NO_STEPS,
    LinearProbeSettings,
    fit,
    head_of_class_means,
)
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.algorithms.prototypes import Prototypes
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.settings import setting, whole
from fedhelp_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class FedPFTSettings(LinearProbeSettings):
    """Settings of FedPFT."""

    draws: int = setting(2000, "features that the server draws in a round", whole(1))


@method(FedPFTSettings, reads_answers=True, unused=(*NO_NETWORK, *NO_STEPS))
def fedpft(setup: Setup, settings: FedPFTSettings) -> FederatedAlgorithm:
    """FedPFT: a head fitted on features drawn from Gaussians of each client's classes.

    Raises:
      UserError: If the run is about masks.
    """

    def make_head(head: Params, sent: Prototypes, key: jax.Array) -> Params:
        means, squares = jnp.split(sent.means, 2, axis=-1)
        features, labels = draw(key, sent._replace(means=means), squares, settings.draws)
        every = jnp.ones(settings.draws, bool)
        fitted, _ = fit(head, features, labels, every, l2=settings.l2, steps=settings.steps)
        return jax.tree.map(functools.partial(jnp.where, jnp.sum(sent.counts) > 0), fitted, head)

    return head_of_class_means(setup, "fedpft", make_head, seen=_with_squares, server_trains=True)


def draw(
    key: jax.Array, sent: Prototypes, squares: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Draws features of all clients' classes, in proportion to their numbers of images.

    Args:
      key: Random key.
      sent: Means ``[K, C, D]`` and counts ``[K, C]`` of each client's classes; the counts may not
        all be 0.
      squares: Means of the squared features, ``[K, C, D]``.
      count: Number of draws.

    Returns:
      Features ``[count, D]`` and their classes, int32 ``[count]``.
    """
    which, noise = jax.random.split(key)
    num_classes, width = sent.means.shape[1:]
    counts = sent.counts.reshape(-1)
    shares = counts / jnp.maximum(jnp.sum(counts), 1)
    chosen = jax.random.choice(which, counts.size, (count,), p=shares)
    means = sent.means.reshape(-1, width)[chosen]
    variances = jnp.maximum(squares.reshape(-1, width)[chosen] - means**2, 0)
    drawn = means + jnp.sqrt(variances) * jax.random.normal(noise, means.shape, means.dtype)
    return drawn, chosen % num_classes


def _with_squares(model: Model) -> Model:
    """Returns a network whose features are those of another, and then their squares."""

    def features(*args: object, **kwargs: object) -> tuple[jax.Array, Variables]:
        values, stats = model.features(*args, **kwargs)
        return jnp.concatenate([values, values**2], axis=-1), stats

    return model._replace(features=features)
