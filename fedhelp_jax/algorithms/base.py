"""The one abstraction that every method fits, and what methods are built from."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedhelp_jax.algorithms.client import Batch, Info, gradient_step, run_epochs, sgd_l2
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.random import Purpose, for_purpose
from fedhelp_jax.core.tree import weighted_mean
from fedhelp_jax.data.federation import ROLES, ClientData, PublicPool
from fedhelp_jax.losses import masked_mean
from fedhelp_jax.models.model import Model, Variables, apply_model
from fedhelp_jax.tasks import Task
from fedhelp_jax.transforms import augment


class PublicSpec(NamedTuple):
    """The public set: its size and label spaces.

    Attributes:
      num_images: How many images.
      num_labels: How many labels its images have, or None without labels.
      num_answers: Over how many classes the foundation model answers, or None without answers.
      shared: Whether both are one label space, so that one head serves both.
    """

    num_images: int
    num_labels: int | None
    num_answers: int | None
    shared: bool


class Setup(NamedTuple):
    """What every method is given besides its own settings.

    Attributes:
      task: Losses, heads and metrics.
      num_classes: Classes of the private data.
      sample_shape: Of an image.
      models: The two architectures, "small" and "large".
      tx: The clients' optimizer, with learning rate and weight decay.
      learning_rate: The clients' once more, for methods whose rule takes plain SGD.
      weight_decay: Likewise.
      schedule: What learning rates are multiplied by in this round. ``tx`` and ``learning_rate``
        are so already.
      server_tx: Optimizer that takes the averaged update as a gradient (2003.00295), for every
        method that averages parameters; None takes the mean itself.
      batch_size: Private examples a step.
      public_batch_size: Public examples a step.
      local_epochs: Passes over a client's data in a round.
      public: Label spaces of the public set, or None without one.
      augment: How training batches are changed, of `fedhelp_jax.transforms.AUGMENTATIONS`.
      rounds: How many rounds the run has, for methods with a schedule over them.
    """

    task: Task
    num_classes: int
    sample_shape: tuple[int, ...]
    models: Mapping[str, Model]
    tx: optax.GradientTransformation
    batch_size: int
    public_batch_size: int
    local_epochs: int
    public: PublicSpec | None
    augment: tuple[str, ...] = ()
    rounds: int = 1
    learning_rate: float | jax.Array = 0.01
    weight_decay: float = 0.0
    schedule: float | jax.Array = 1.0
    server_tx: optax.GradientTransformation | None = None

    @property
    def sgd(self) -> optax.GradientTransformation:
        """Plain SGD, for methods whose rule takes it."""
        return sgd_l2(self.learning_rate, self.weight_decay)


class ClientAlgorithm(NamedTuple):
    """What the clients of one role do; every function is pure and speaks of ONE client.

    Attributes:
      models: The networks this client could deploy, by name; the headline one first.
      init: ``(run_key, client_id) -> state``.
      update: ``(key, download, state, data) -> (state, upload, info)``; ``key`` is the client's in
        this round, ``upload`` a tree of arrays or None, ``info`` scalars to report: always "loss";
        "bytes_up" and "bytes_down", int32, where what travels is less than upload and download are.
      deploy: ``(download, state, data) -> {name: variables}``, the names those of ``models``.
      adapts: Whether ``deploy`` is given ``data``, what the client trains on, to adapt to it at the
        end; else None.
    """

    models: Mapping[str, Model]
    init: Callable[[jax.Array, jax.Array], Any]
    update: Callable[[jax.Array, Any, Any, ClientData], tuple[Any, Any, Info]]
    deploy: Callable[[Any, Any, Any], dict[str, Variables]]
    adapts: bool = False


# What a client's own network is called in reports.
PRIVATE = {"small": "personal", "large": "large"}


class ServerData(NamedTuple):
    """What a server has besides its state and the uploads.

    Attributes:
      key: The round's.
      public: The public set, or None.
      pooled: All clients' training data as one client's. No federated method may look at it; it is
        there for the reference that may, and None where no device holds it.
      num_clients: How many clients there are, whether they took part or not.
    """

    key: jax.Array
    public: PublicPool | None
    pooled: ClientData | None
    num_clients: int


class FederatedAlgorithm(NamedTuple):
    """A federated method as a handful of pure functions.

    Attributes:
      init: ``run_key -> server_state``.
      download: ``(server_state, role) ->`` what every client of a role receives.
      clients: One :class:`ClientAlgorithm` per role, "small" and "large".
      aggregate: ``(server_state, uploads, weights, data) -> server_state``: by role stacked uploads
        ``[K, ...]`` and weights ``[K]``, 0 for whoever took no part; ``data`` a
        :class:`ServerData`. Roles that nobody has are missing.
      mean_only: Whether ``aggregate`` uses no more of the uploads than their weighted mean over all
        clients. Then it is given means of some clients each, and the sums of their weights.
      server_trains: Whether ``aggregate`` takes gradient steps, so is worth compiling in full.
    """

    init: Callable[[jax.Array], Any]
    download: Callable[[Any, str], Any]
    clients: Mapping[str, ClientAlgorithm]
    aggregate: Callable[[Any, Mapping[str, Any], Mapping[str, jax.Array], ServerData], Any]
    mean_only: bool = False
    server_trains: bool = False


def init_shared(setup: Setup, run_key: jax.Array, role: str = "small") -> Variables:
    """An architecture's first weights, the same for the server and for every client."""
    key = for_purpose(run_key, Purpose.SERVER_INIT)
    return setup.models[role].init(key, setup.sample_shape)


def init_own(setup: Setup, model: Model, run_key: jax.Array, client_id: jax.Array) -> Variables:
    """First weights of a network that is one client's own, the same whatever the method."""
    return model.init(client_init_key(run_key, client_id), setup.sample_shape)


def init_private(setup: Setup, role: str, run_key: jax.Array, client_id: jax.Array) -> Variables:
    """First weights of a role's architecture where it stays with its client: as trained alone."""
    if role == "small":
        return init_shared(setup, run_key)
    return init_own(setup, setup.models[role], run_key, client_id)


def feature_width(setup: Setup, role: str = "small") -> int:
    """How many features an architecture's head is given."""
    model = setup.models[role]

    def features(key: jax.Array) -> jax.Array:
        variables = model.init(key, setup.sample_shape)
        image = jnp.zeros((1, *setup.sample_shape))
        return model.features(variables, image, train=False, mask=None)[0]

    return jax.eval_shape(features, jax.random.key(0)).shape[-1]


def check_one_head(setup: Setup, name: str) -> None:
    """For methods that share features or a head: both architectures must have the same head.

    Raises:
      UserError: If they have not.
    """

    def head(role: str) -> Any:
        init = functools.partial(setup.models[role].init, sample_shape=setup.sample_shape)
        return jax.eval_shape(init, jax.random.key(0))["params"]["head"]

    widths = {role: jax.tree.map(lambda leaf: leaf.shape, head(role)) for role in ROLES}
    if widths["small"] != widths["large"]:
        raise UserError(
            f"algorithm.name: {name} needs features of one width, but the heads of model.small and "
            f"model.large are of shapes {widths['small']} and {widths['large']}"
        )


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


def local_epochs(
    setup: Setup,
    key: jax.Array,
    step: Callable[[Any, Batch, jax.Array], tuple[Any, Info]],
    carry: Any,
    data: ClientData,
) -> tuple[Any, Info]:
    """A round's pass over a client's private data, in the same batches whatever the method.

    With ``setup.augment`` each batch is changed at random before the step sees it.

    Args:
      setup: What the method is given.
      key: The client's in this round.
      step: ``(carry, batch, step_index) -> (carry, info)``.
      carry: Whatever the method trains.
      data: The client's data.

    Returns:
      ``(carry, info)``, as :func:`~fedhelp_jax.algorithms.client.run_epochs`.
    """
    augmentation = for_purpose(key, Purpose.AUGMENTATION)

    def step_augmented(carry: Any, batch: Batch, number: jax.Array) -> tuple[Any, Info]:
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
    step: Callable[[Any, Batch, jax.Array], tuple[Any, Info]],
    carry: Any,
    data: ClientData,
) -> tuple[Any, Info]:
    """One pass over a client's private data, for sums in which the order does not count."""
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
    """Training on a client's private data, with a fresh optimizer.

    Args:
      setup: What the method is given.
      model: The network.
      key: The client's in this round.
      variables: Where to start.
      data: The client's data.
      tx: The optimizer; ``setup.tx`` if None. Terms of a method's own come before it in a chain.
      loss: In place of :func:`supervised_loss`.

    Returns:
      The variables after ``local_epochs``, and the mean loss.
    """
    tx = setup.tx if tx is None else tx

    def step(carry: Any, batch: Batch, _: jax.Array) -> tuple[Any, Info]:
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


def proximal(weight: float | jax.Array, anchor: Any) -> optax.GradientTransformation:
    """Adds ``weight (params - anchor)``, the gradient of ``weight/2 |params - anchor|^2``."""

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda g, p, a: g + weight * (p - a), updates, params, anchor)

    return optax.stateless(update)


class Averaged(NamedTuple):
    """State of a server that averages: the variables it broadcasts, and its optimizer's state."""

    variables: Variables
    opt_state: Any


def init_averaged(setup: Setup, variables: Variables) -> Averaged:
    """The state before the first round."""
    opt_state = () if setup.server_tx is None else setup.server_tx.init(variables["params"])
    return Averaged(variables, opt_state)


def average(
    setup: Setup, state: Averaged, uploads: Mapping[str, Any], weights: Mapping[str, jax.Array]
) -> Averaged:
    """The weighted mean of all uploads, of whatever role, or the server optimizer's step to it.

    With ``setup.server_tx`` the averaged update is a gradient, ``g = w - mean`` (Reddi et al.,
    arXiv:2003.00295, algorithm 2, where its negative is called Delta); plain SGD of rate 1 is the
    mean. Batch statistics are averaged in any case.
    """
    mean = weighted_mean(list(uploads.values()), list(weights.values()))
    if setup.server_tx is None:
        return Averaged(mean, ())
    params = state.variables["params"]
    gradient = jax.tree.map(lambda p, m: p - m, params, mean["params"])
    updates, opt_state = setup.server_tx.update(gradient, state.opt_state, params)
    return Averaged({**mean, "params": optax.apply_updates(params, updates)}, opt_state)


def averaging(setup: Setup, clients: Mapping[str, ClientAlgorithm]) -> FederatedAlgorithm:
    """A method whose server broadcasts the small architecture and averages what comes back."""
    return FederatedAlgorithm(
        init=lambda run_key: init_averaged(setup, init_shared(setup, run_key)),
        download=lambda server_state, role: server_state.variables,
        clients=clients,
        aggregate=lambda state, uploads, weights, data: average(setup, state, uploads, weights),
        mean_only=True,
    )


def training_client(
    setup: Setup,
    train: Callable[[jax.Array, Variables, ClientData], tuple[Variables, Info]],
    role: str = "small",
    *,
    personal: bool = True,
) -> ClientAlgorithm:
    """A client that trains the broadcast model and sends the outcome back.

    The broadcast model is what it deploys (``global``); its own copy after the training is reported
    beside it (``personal``), for which it is kept.

    Args:
      setup: What the method is given.
      train: ``(key, w, data) -> (variables, info)``.
      role: Whose architecture it is.
      personal: Whether its own copy is kept; without it the client has no state.

    Returns:
      The client.
    """
    model = setup.models[role]

    def update(key: jax.Array, download: Variables, state: Variables, data: ClientData) -> Any:
        del state
        variables, info = train(key, download, data)
        return variables if personal else (), variables, info

    if not personal:
        return ClientAlgorithm(
            models={"global": model},
            init=lambda run_key, client_id: (),
            update=update,
            deploy=lambda download, state, data: {"global": download},
        )
    return ClientAlgorithm(
        models={"global": model, "personal": model},
        init=lambda run_key, client_id: init_shared(setup, run_key, role),
        update=update,
        deploy=lambda download, state, data: {"global": download, "personal": state},
    )


def private_client(
    setup: Setup,
    role: str,
    update: Callable[[jax.Array, Any, Any, ClientData], tuple[Any, Any, Info]],
    *,
    broadcast: bool = False,
) -> ClientAlgorithm:
    """A client whose state is a network of its role's architecture, which it keeps and deploys.

    Args:
      setup: What the method is given.
      role: Of the client.
      update: As in :class:`ClientAlgorithm`.
      broadcast: Whether what it downloads is a small network, which is then reported (``global``).

    Returns:
      The client.
    """
    models = {PRIVATE[role]: setup.models[role]}
    if broadcast:
        models["global"] = setup.models["small"]

    def deploy(download: Any, state: Variables, data: ClientData) -> dict[str, Variables]:
        del data
        return {PRIVATE[role]: state} | ({"global": download} if broadcast else {})

    return ClientAlgorithm(models, functools.partial(init_private, setup, role), update, deploy)
