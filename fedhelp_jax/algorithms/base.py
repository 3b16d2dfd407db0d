"""The one abstraction that every method fits, and what methods are built from."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from fedhelp_jax.client import Batch, Info, gradient_step, run_epochs
from fedhelp_jax.federation import ClientData
from fedhelp_jax.losses import masked_mean
from fedhelp_jax.models.model import Model, Variables, apply_model
from fedhelp_jax.random import Purpose, for_purpose
from fedhelp_jax.task import Task
from fedhelp_jax.tree import weighted_mean


class PublicSpec(NamedTuple):
    """Label spaces of the public set.

    Attributes:
      num_labels: How many labels its images have, or None without labels.
      num_answers: Over how many classes the foundation model answers, or None without answers.
      shared: Whether both are one label space, so that one head serves both.
    """

    num_labels: int | None
    num_answers: int | None
    shared: bool


class Setup(NamedTuple):
    """What every method is given besides its own settings."""

    task: Task
    num_classes: int
    sample_shape: tuple[int, ...]
    models: Mapping[str, Model]
    tx: optax.GradientTransformation
    batch_size: int
    public_batch_size: int
    local_epochs: int
    public: PublicSpec | None


class ClientAlgorithm(NamedTuple):
    """What the clients of one role do; every function is pure and speaks of ONE client.

    Attributes:
      models: The networks this client could deploy, by name; the headline one first.
      init: ``(run_key, client_id) -> state``.
      update: ``(key, download, state, data) -> (state, upload, info)``; ``key`` is the client's in
        this round, ``upload`` a tree of arrays or None, ``info`` scalars to report: always "loss".
      deploy: ``(download, state) -> {name: variables}``, the names those of ``models``.
    """

    models: Mapping[str, Model]
    init: Callable[[jax.Array, jax.Array], Any]
    update: Callable[[jax.Array, Any, Any, ClientData], tuple[Any, Any, Info]]
    deploy: Callable[[Any, Any], dict[str, Variables]]


class FederatedAlgorithm(NamedTuple):
    """A federated method as a handful of pure functions.

    Attributes:
      init: ``run_key -> server_state``.
      download: ``server_state ->`` what every client receives.
      clients: One :class:`ClientAlgorithm` per role, "small" and "large".
      aggregate: ``(server_state, uploads, weights) -> server_state``: per group stacked uploads
        ``[K, ...]`` and weights ``[K]``, 0 for whoever took no part.
    """

    init: Callable[[jax.Array], Any]
    download: Callable[[Any], Any]
    clients: Mapping[str, ClientAlgorithm]
    aggregate: Callable[[Any, tuple[Any, ...], tuple[jax.Array, ...]], Any]


def init_shared(setup: Setup, run_key: jax.Array) -> Variables:
    """The small architecture's first weights, the same for the server and for every client."""
    key = for_purpose(run_key, Purpose.SERVER_INIT)
    return setup.models["small"].init(key, setup.sample_shape)


def init_own(setup: Setup, model: Model, run_key: jax.Array, client_id: jax.Array) -> Variables:
    """First weights of a network that is one client's own, the same whatever the method."""
    return model.init(client_init_key(run_key, client_id), setup.sample_shape)


def client_init_key(run_key: jax.Array, client_id: jax.Array) -> jax.Array:
    """The key of everything a client draws before the first round."""
    return jax.random.fold_in(for_purpose(run_key, Purpose.CLIENT_INIT), client_id)


def supervised_loss(
    setup: Setup, model: Model, batch_stats: Variables, batch: Batch
) -> Callable[[Variables], tuple[jax.Array, tuple[jax.Array, Variables]]]:
    """``params -> (mean loss, (logits, new batch_stats))`` on a private batch in training mode."""

    def loss_fn(params: Variables) -> tuple[jax.Array, tuple[jax.Array, Variables]]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new_stats = apply_model(model, variables, batch.images, train=True, mask=batch.mask)
        loss = setup.task.loss(logits, batch.targets, where=batch.mask)
        return masked_mean(loss, batch.mask), (logits, new_stats)

    return loss_fn


def train_locally(
    setup: Setup, model: Model, key: jax.Array, variables: Variables, data: ClientData
) -> tuple[Variables, Info]:
    """Plain supervised training on a client's private data, with a fresh optimizer."""

    def step(carry: Any, batch: Batch, _: jax.Array) -> tuple[Any, Info]:
        variables, opt_state = carry
        loss_fn = supervised_loss(setup, model, variables["batch_stats"], batch)
        params, opt_state, loss, (_, stats) = gradient_step(
            setup.tx, loss_fn, variables["params"], opt_state
        )
        return ({"params": params, "batch_stats": stats}, opt_state), {"loss": loss}

    (variables, _), info = run_epochs(
        step,
        (variables, setup.tx.init(variables["params"])),
        data,
        for_purpose(key, Purpose.PRIVATE_BATCHES),
        batch_size=setup.batch_size,
        local_epochs=setup.local_epochs,
    )
    return variables, info


def mean_of_uploads(
    server_state: Any, uploads: tuple[Any, ...], weights: tuple[jax.Array, ...]
) -> Any:
    """The new server state is the weighted mean of all uploads, of whatever role."""
    del server_state
    return weighted_mean(uploads, weights)
