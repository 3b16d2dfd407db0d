"""The one abstraction that every method fits, and what methods are built from."""

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
    init: Callable[[jax.Array, jax.Array], ClientState]
    update: Callable[[jax.Array, Download, ClientState, ClientData], Updated]
    deploy: Callable[[Download, ClientState, Any], dict[str, Variables]]
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

    init: Callable[[jax.Array], ServerState]
    download: Callable[[ServerState, str], Download]
    clients: Mapping[str, ClientAlgorithm]
    aggregate: Callable[
        [ServerState, Mapping[str, Upload], Mapping[str, jax.Array], ServerData], ServerState
    ]
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
    """The key of everything a client draws before the first round."""
    return jax.random.fold_in(for_purpose(run_key, Purpose.CLIENT_INIT), client_id)
