"""Defines the interface that every method implements, and the parts that methods share."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedhelp_jax.algorithms.client import Updated, sgd_l2
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.random import Purpose, for_purpose
from fedhelp_jax.data.federation import ROLES, ClientData, PublicPool
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.tasks import Task
from fedhelp_jax.typing import ClientState, Download, PyTree, ServerState, Upload


class PublicSpec(NamedTuple):
    """The size and the label spaces of the public set.

    Attributes:
      num_images: Number of images.
      num_labels: Number of classes of the public labels, or None without labels.
      num_answers: Number of classes of the foundation model's answers, or None without answers.
      shared: Whether labels and answers share one label space, so that one head serves both.
    """

    num_images: int
    num_labels: int | None
    num_answers: int | None
    shared: bool


class Setup(NamedTuple):
    """What every method is given besides its own settings.

    Attributes:
      task: Losses, heads and metrics.
      num_classes: Number of classes of the private data.
      sample_shape: Shape of an image.
      models: The two architectures, "small" and "large".
      tx: The clients' optimizer, with learning rate and weight decay.
      learning_rate: The clients' learning rate, for methods whose rule requires plain SGD.
      weight_decay: The clients' weight decay, likewise.
      schedule: The factor of the learning rates in this round. ``tx`` and ``learning_rate`` already
        include it.
      server_tx: Optimizer that takes the averaged update as a gradient (2003.00295), for every
        method that averages parameters; None takes the mean itself.
      batch_size: Private examples per step.
      public_batch_size: Public examples per step.
      local_epochs: Passes over a client's data in a round.
      public: Label spaces of the public set, or None without one.
      augment: Augmentations of training batches, from `fedhelp_jax.transforms.AUGMENTATIONS`.
      rounds: Number of rounds of the run, for methods with a schedule over them.
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
        """Plain SGD, for methods whose rule requires it."""
        return sgd_l2(self.learning_rate, self.weight_decay)


class ClientAlgorithm(NamedTuple):
    """What the clients of one role do; every function is pure and handles ONE client.

    Attributes:
      models: The networks that this client could deploy, by name; the headline one first.
      init: ``(run_key, client_id) -> state``.
      update: ``(key, download, state, data) -> (state, upload, info)``. ``key`` is the client's key
        in this round, and ``upload`` a tree of arrays or None. ``info`` holds scalars to report. It
        always has "loss", and has "bytes_up" and "bytes_down", int32, if fewer bytes are sent than
        the upload and the download hold.
      deploy: ``(download, state, data) -> {name: variables}``, with the names of ``models``.
      adapts: Whether ``deploy`` receives the client's training data as ``data``, to adapt to it;
        otherwise ``data`` is None.
    """

    models: Mapping[str, Model]
    init: Callable[[jax.Array, jax.Array], ClientState]
    update: Callable[[jax.Array, Download, ClientState, ClientData], Updated]
    deploy: Callable[[Download, ClientState, Any], dict[str, Variables]]
    adapts: bool = False


# The name of a client's own network in reports.
PRIVATE = {"small": "personal", "large": "large"}


class ServerData(NamedTuple):
    """What a server has besides its state and the uploads.

    Attributes:
      key: The server's key in this round.
      public: The public set, or None.
      pooled: All clients' training data, as if one client owned it. Federated methods must not use
        it; it exists for the centralized reference. None if no device holds all of it.
      num_clients: Number of all clients, whether they took part or not.
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
      aggregate: ``(server_state, uploads, weights, data) -> server_state``. By role, ``uploads``
        are stacked, ``[K, ...]``, and ``weights`` are ``[K]``, with 0 for clients that did not take
        part. Roles without clients are missing. ``data`` is a :class:`ServerData`.
      mean_only: Whether ``aggregate`` depends on the uploads only through their weighted mean over
        all clients. If so, it is given the means of subsets of clients, and the sums of their
        weights.
      server_trains: Whether ``aggregate`` takes gradient steps, and should be compiled with full
        optimisation.
    """

    init: Callable[[jax.Array], ServerState]
    download: Callable[[ServerState, str], Download]
    clients: Mapping[str, ClientAlgorithm]
    aggregate: Callable[
        [ServerState, Mapping[str, Upload], Mapping[str, jax.Array], ServerData], ServerState
    ]
    mean_only: bool = False
    server_trains: bool = False


def init_shared(setup: Setup, run_key: jax.Array, role: str = "small") -> Variables:
    """Returns the initial weights of an architecture, equal for the server and all clients."""
    key = for_purpose(run_key, Purpose.SERVER_INIT)
    return setup.models[role].init(key, setup.sample_shape)


def init_own(setup: Setup, model: Model, run_key: jax.Array, client_id: jax.Array) -> Variables:
    """Returns the initial weights of a client's own network, equal under every method."""
    return model.init(client_init_key(run_key, client_id), setup.sample_shape)


def init_private(setup: Setup, role: str, run_key: jax.Array, client_id: jax.Array) -> Variables:
    """Returns the initial weights of a client's private network, as in local training."""
    if role == "small":
        return init_shared(setup, run_key)
    return init_own(setup, setup.models[role], run_key, client_id)


def feature_width(setup: Setup, role: str = "small") -> int:
    """Returns the number of features that an architecture's head takes."""
    model = setup.models[role]

    def features(key: jax.Array) -> jax.Array:
        variables = model.init(key, setup.sample_shape)
        image = jnp.zeros((1, *setup.sample_shape))
        return model.features(variables, image, train=False, mask=None)[0]

    return jax.eval_shape(features, jax.random.key(0)).shape[-1]


def check_one_head(setup: Setup, name: str) -> None:
    """Checks that both architectures have the same head, for methods that share features or it.

    Raises:
      UserError: If the heads differ.
    """

    def head(role: str) -> PyTree:
        init = functools.partial(setup.models[role].init, sample_shape=setup.sample_shape)
        return jax.eval_shape(init, jax.random.key(0))["params"]["head"]

    widths = {role: jax.tree.map(lambda leaf: leaf.shape, head(role)) for role in ROLES}
    if widths["small"] != widths["large"]:
        raise UserError(
            f"algorithm.name: {name} needs features of one width, but the heads of model.small and "
            f"model.large are of shapes {widths['small']} and {widths['large']}"
        )


def client_init_key(run_key: jax.Array, client_id: jax.Array) -> jax.Array:
    """Returns the key of everything that a client draws before the first round."""
    return jax.random.fold_in(for_purpose(run_key, Purpose.CLIENT_INIT), client_id)
