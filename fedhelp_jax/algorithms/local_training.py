"""Implements training on private data, and the clients that do only that."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from fedhelp_jax.algorithms.base import (
    PRIVATE,
    ClientAlgorithm,
    Setup,
    init_private,
    init_shared,
)
from fedhelp_jax.algorithms.client import Batch, Info, Updated, gradient_step, run_epochs
from fedhelp_jax.core.random import Purpose, for_purpose
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.losses import masked_mean
from fedhelp_jax.models.model import Model, Variables, apply_model
from fedhelp_jax.transforms import augment
from fedhelp_jax.typing import Carry, ClientState, Download, Params


def supervised_loss(
    setup: Setup, model: Model, batch_stats: Variables, batch: Batch
) -> Callable[[Variables], tuple[jax.Array, tuple[jax.Array, Variables]]]:
    """Returns the training loss on a private batch.

    Returns:
      ``params -> (mean loss, (logits, new batch_stats))``, in training mode.
    """

    def loss_fn(params: Variables) -> tuple[jax.Array, tuple[jax.Array, Variables]]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new_stats = apply_model(model, variables, batch.images, train=True, mask=batch.mask)
        loss = setup.task.loss(logits, batch.targets, where=batch.mask)
        return masked_mean(loss, batch.mask), (logits, new_stats)

    return loss_fn


def local_epochs(
    setup: Setup,
    key: jax.Array,
    step: Callable[[Carry, Batch, jax.Array], tuple[Carry, Info]],
    carry: Carry,
    data: ClientData,
) -> tuple[Carry, Info]:
    """Runs a round's local epochs on a client's private data, with the same batches in all methods.

    With ``setup.augment``, each batch is augmented at random before the step.

    Args:
      setup: What the method is given.
      key: The client's key in this round.
      step: ``(carry, batch, step_index) -> (carry, info)``.
      carry: What the method trains.
      data: The client's data.

    Returns:
      ``(carry, info)``, as from :func:`~fedhelp_jax.algorithms.client.run_epochs`.
    """
    augmentation = for_purpose(key, Purpose.AUGMENTATION)

    def step_augmented(carry: Carry, batch: Batch, number: jax.Array) -> tuple[Carry, Info]:
        own = jax.random.fold_in(augmentation, number)
        images, targets = augment(own, batch.images, batch.targets, setup.augment)
        return step(carry, batch._replace(images=images, targets=targets), number)

    return run_epochs(
        step_augmented if setup.augment else step,
        carry,
        data,
        for_purpose(key, Purpose.PRIVATE_BATCHES),
        batch_size=setup.batch_size,
        local_epochs=setup.local_epochs,
    )


def one_pass(
    setup: Setup,
    step: Callable[[Carry, Batch, jax.Array], tuple[Carry, Info]],
    carry: Carry,
    data: ClientData,
) -> tuple[Carry, Info]:
    """Makes one pass over a client's private data, for sums in which order does not matter."""
    return run_epochs(
        step, carry, data, jax.random.key(0), batch_size=setup.batch_size, local_epochs=1
    )


def train_locally(
    setup: Setup,
    model: Model,
    key: jax.Array,
    variables: Variables,
    data: ClientData,
    *,
    tx: optax.GradientTransformation | None = None,
    loss: Callable[..., Any] = supervised_loss,
) -> tuple[Variables, Info]:
    """Trains a network on a client's private data, with a fresh optimizer.

    Args:
      setup: What the method is given.
      model: The network.
      key: The client's key in this round.
      variables: The initial variables.
      data: The client's data.
      tx: The optimizer; ``setup.tx`` if None. A method adds its own terms before it in a chain.
      loss: Replaces :func:`supervised_loss`.

    Returns:
      The variables after ``local_epochs``, and the mean loss.
    """
    tx = setup.tx if tx is None else tx

    def step(carry: Carry, batch: Batch, _: jax.Array) -> tuple[Carry, Info]:
        variables, opt_state = carry
        loss_fn = loss(setup, model, variables["batch_stats"], batch)
        params, opt_state, value, (_, stats) = gradient_step(
            tx, loss_fn, variables["params"], opt_state
        )
        return ({"params": params, "batch_stats": stats}, opt_state), {"loss": value}

    (variables, _), info = local_epochs(
        setup, key, step, (variables, tx.init(variables["params"])), data
    )
    return variables, info


def proximal(weight: float | jax.Array, anchor: Params) -> optax.GradientTransformation:
    """Adds ``weight (params - anchor)``, the gradient of ``weight/2 |params - anchor|^2``."""

    def update(updates: Params, params: Params) -> Params:
        return jax.tree.map(lambda g, p, a: g + weight * (p - a), updates, params, anchor)

    return optax.stateless(update)


def training_client(
    setup: Setup,
    train: Callable[[jax.Array, Variables, ClientData], tuple[Variables, Info]],
    role: str = "small",
    *,
    personal: bool = True,
) -> ClientAlgorithm:
    """Returns a client that trains the broadcast model and sends the result back.

    It deploys the broadcast model (``global``). Its own copy after training is kept so that it can
    also be reported (``personal``).

    Args:
      setup: What the method is given.
      train: ``(key, w, data) -> (variables, info)``.
      role: The role whose architecture is trained.
      personal: Whether the client keeps its own copy; without it, the client has no state.

    Returns:
      The client.
    """
    model = setup.models[role]

    def update(key: jax.Array, download: Variables, state: Variables, data: ClientData) -> Updated:
        del state
        variables, info = train(key, download, data)
        return variables if personal else (), variables, info

    if not personal:
        return broadcast_client(model, update)
    return ClientAlgorithm(
        models={"global": model, "personal": model},
        init=lambda run_key, client_id: init_shared(setup, run_key, role),
        update=update,
        deploy=lambda download, state, data: {"global": download, "personal": state},
    )


def broadcast_client(
    model: Model, update: Callable[[jax.Array, Variables, Any, ClientData], Updated]
) -> ClientAlgorithm:
    """Returns a client without a state, which deploys the broadcast network (``global``).

    Args:
      model: The network.
      update: As in :class:`ClientAlgorithm`.
    """
    return ClientAlgorithm(
        models={"global": model},
        init=lambda run_key, client_id: (),
        update=update,
        deploy=lambda download, state, data: {"global": download},
    )


def personal_client(
    setup: Setup, update: Callable[[jax.Array, Variables, Variables, ClientData], Updated]
) -> ClientAlgorithm:
    """Returns a client whose state is a network of its own (``personal``), which it deploys.

    It is of the small architecture, as is the broadcast network, which is also reported
    (``global``).

    Args:
      setup: What the method is given.
      update: As in :class:`ClientAlgorithm`.
    """
    model = setup.models["small"]
    return ClientAlgorithm(
        models={"personal": model, "global": model},
        init=lambda run_key, client_id: init_shared(setup, run_key),
        update=update,
        deploy=lambda download, state, data: {"personal": state, "global": download},
    )


def private_client(
    setup: Setup,
    role: str,
    update: Callable[[jax.Array, Download, ClientState, ClientData], Updated],
    *,
    broadcast: bool = False,
) -> ClientAlgorithm:
    """Returns a client that keeps and deploys a network of its role's architecture as its state.

    Args:
      setup: What the method is given.
      role: The client's role.
      update: As in :class:`ClientAlgorithm`.
      broadcast: Whether the download is a small network, which is then also reported (``global``).

    Returns:
      The client.
    """
    models = {PRIVATE[role]: setup.models[role]}
    if broadcast:
        models["global"] = setup.models["small"]

    def deploy(download: Download, state: Variables, data: ClientData) -> dict[str, Variables]:
        del data
        return {PRIVATE[role]: state} | ({"global": download} if broadcast else {})

    return ClientAlgorithm(models, functools.partial(init_private, setup, role), update, deploy)
