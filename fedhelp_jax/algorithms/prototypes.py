"""Computes class means of features, which FedProto and FedGH send instead of weights."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import Setup, feature_width
from fedhelp_jax.algorithms.client import Batch, Info
from fedhelp_jax.algorithms.local_training import one_pass
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.models.model import Model, Variables


class Prototypes(NamedTuple):
    """Mean features of each class.

    Attributes:
      means: float ``[..., C, D]``; zeros for a class without examples.
      counts: float ``[..., C]``; number of examples. For feature maps, an example counts by the
        share that a class covers.
    """

    means: jax.Array
    counts: jax.Array


def no_prototypes(setup: Setup) -> Prototypes:
    """Returns the prototypes of an empty data set."""
    classes = setup.task.num_ranked(setup.num_classes)
    return Prototypes(jnp.zeros((classes, feature_width(setup))), jnp.zeros(classes))


def class_means(setup: Setup, model: Model, variables: Variables, data: ClientData) -> Prototypes:
    """Returns each class's mean features over a client's training data, in evaluation mode."""
    zeros = no_prototypes(setup)

    def step(sums: Prototypes, batch: Batch, _: jax.Array) -> tuple[Prototypes, Info]:
        features, _stats = model.features(variables, batch.images, train=False, mask=None)
        members = members_of(setup, batch, features)
        pixels = features.size // (features.shape[0] * features.shape[-1])
        means = jnp.einsum("...c,...d->cd", members, features) / pixels
        counts = jnp.sum(members, axis=range(members.ndim - 1)) / pixels
        return Prototypes(sums.means + means, sums.counts + counts), {}

    sums, _ = one_pass(setup, step, zeros, data)
    return Prototypes(sums.means / jnp.where(sums.counts > 0, sums.counts, 1)[:, None], sums.counts)


def gathered(uploads: Mapping[str, Prototypes], weights: Mapping[str, jax.Array]) -> Prototypes:
    """Concatenates the clients of all roles, ``[K, C, D]``; zeros for those that took no part."""
    present = jnp.concatenate([weights[role] > 0 for role in uploads])
    means = jnp.concatenate([up.means for up in uploads.values()])
    counts = jnp.concatenate([up.counts for up in uploads.values()])
    return Prototypes(
        jnp.where(present[:, None, None], means, 0), jnp.where(present[:, None], counts, 0)
    )


def mean_prototypes(sent: Prototypes) -> Prototypes:
    """Returns the means of clients' class means ``[K, C, D]`` by their counts, and the sums."""
    counts = jnp.sum(sent.counts, axis=0)
    shares = sent.counts / jnp.where(counts > 0, counts, 1)
    return Prototypes(jnp.einsum("kc,kcd->cd", shares, sent.means), counts)


def members_of(setup: Setup, batch: Batch, features: jax.Array) -> jax.Array:
    """Returns the class shares of each feature position, ``[B, *spatial, C]``; 0 where masked."""
    classes = setup.task.num_ranked(setup.num_classes)
    members: jax.Array = setup.task.memberships(batch.targets, features.shape[1:-1], classes)
    return members * batch.mask.reshape(-1, *(1,) * (members.ndim - 1))
