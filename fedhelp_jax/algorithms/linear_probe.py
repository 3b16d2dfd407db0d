"""Linear probes on pixels, or on what a foundation model answers, and heads of class means."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fedhelp_jax.algorithms.base import FederatedAlgorithm, ServerData, Setup
from fedhelp_jax.algorithms.client import Batch, Info, Updated
from fedhelp_jax.algorithms.local_training import broadcast_client, one_pass, private_client
from fedhelp_jax.algorithms.method import AVERAGING
from fedhelp_jax.algorithms.prototypes import Prototypes, class_means, gathered
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.federation import ROLES, ClientData, normalize_images
from fedhelp_jax.losses import cross_entropy_loss, masked_mean
from fedhelp_jax.models import layers
from fedhelp_jax.models.model import Model, Variables, apply_model
from fedhelp_jax.settings import at_least, setting, whole
from fedhelp_jax.typing import Params

# Below this, the gradient counts as 0.
_FLAT = 1e-5

# What a probe does not use: networks, and how they are trained.
NO_NETWORK = (*AVERAGING, "model", "data.augment")
NO_STEPS = (
    *("optimizer", "learning_rate", "learning_rate_schedule", "weight_decay"),
    *("batch_size", "local_epochs"),
)


@dataclasses.dataclass(frozen=True)
class LinearProbeSettings:
    """Settings of a linear probe."""

    l2: float = setting(0.01, "weight of the squared weights in its loss", at_least(0))
    steps: int = setting(100, "most L-BFGS steps a round", whole(1))


def linear_probe(setup: Setup, settings: LinearProbeSettings, name: str) -> FederatedAlgorithm:
    """Returns the method by which every client fits a probe on its own examples, alone.

    Each round takes at most ``steps`` steps of L-BFGS from where the last round ended; once the
    loss falls no further, it takes one.

    Raises:
      UserError: If the run is about masks.
    """
    setup = with_model(setup, linear_model(setup.num_classes), name)

    def update(key: jax.Array, download: None, state: Variables, data: ClientData) -> Updated:
        del key, download
        mask = jnp.arange(data.index.shape[0]) < data.size
        examples = _flattened(normalize_images(data.pool.images[data.index]))
        stats = _moments(examples, mask)
        head, loss = fit(
            state["params"]["head"],
            (examples - stats["mean"]) / stats["deviation"],
            data.pool.targets[data.index],
            mask,
            l2=settings.l2,
            steps=settings.steps,
        )
        fitted = {"params": {"features": {}, "head": head}, "batch_stats": stats}
        return fitted, None, {"loss": loss}

    return FederatedAlgorithm(
        init=lambda run_key: None,
        download=lambda server_state, role: None,
        clients={role: private_client(setup, role, update) for role in ROLES},
        aggregate=lambda server_state, uploads, weights, data: None,
    )


def with_model(setup: Setup, model: Model, name: str) -> Setup:
    """Returns a setup in which all clients have a linear model, and images are not augmented.

    Raises:
      UserError: If the run is about masks, for which there is no linear probe.
    """
    if setup.task.name != "classification":
        raise UserError(f"algorithm.name: {name} is for classification, not for masks")
    return setup._replace(models=dict.fromkeys(ROLES, model), augment=())


def linear_model(num_classes: int) -> Model:
    """Returns a network without hidden layers; its features are the standardised values.

    The mean and the deviation of each value are its ``batch_stats``. The weights start at zero.
    """

    def init(key: jax.Array, sample_shape: tuple[int, ...]) -> Variables:
        width = math.prod(sample_shape)
        stats = {"mean": jnp.zeros(width), "deviation": jnp.ones(width)}
        return {**_untrained(width, num_classes), "batch_stats": stats}

    def features(
        variables: Variables, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        stats = variables["batch_stats"]
        return (_flattened(x) - stats["mean"]) / stats["deviation"], stats

    return Model(init, features, layers.linear)


def shared_linear_model(num_classes: int) -> Model:
    """Returns the same without statistics, so that clients can share it.

    Each example is standardised by the mean and deviation of its own values.
    """

    def init(key: jax.Array, sample_shape: tuple[int, ...]) -> Variables:
        return {**_untrained(math.prod(sample_shape), num_classes), "batch_stats": {}}

    def features(
        variables: Variables, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        values = _flattened(x)
        mean = jnp.mean(values, axis=-1, keepdims=True)
        deviation = jnp.std(values, axis=-1, keepdims=True)
        return (values - mean) / jnp.maximum(deviation, 1e-6), {}

    return Model(init, features, layers.linear)


def head_of_class_means(
    setup: Setup,
    name: str,
    make_head: Callable[[Params, Prototypes, jax.Array], Params],
    *,
    seen: Callable[[Model], Model] = lambda model: model,
    server_trains: bool = False,
) -> FederatedAlgorithm:
    """Returns a method whose clients send class means, of which the server makes their head.

    Clients train nothing. They deploy the head, a linear one that all share, and report its loss.

    Args:
      setup: What the method is given.
      name: The method's name, for errors.
      make_head: ``(head, sent, key) ->`` the next head; ``sent`` has the class means and counts of
        all clients, ``[K, C, D]`` and ``[K, C]``.
      seen: Turns the linear model into the one whose features the means are of.
      server_trains: As in :class:`FederatedAlgorithm`.

    Raises:
      UserError: If the run is about masks.
    """
    model = shared_linear_model(setup.num_classes)
    described = seen(model)
    of_means, setup = with_model(setup, described, name), with_model(setup, model, name)

    def update(key: jax.Array, download: Variables, state: tuple, data: ClientData) -> Updated:
        del key, state

        def step(carry: None, batch: Batch, _: jax.Array) -> tuple[None, Info]:
            logits, _stats = apply_model(model, download, batch.images)
            loss = setup.task.loss(logits, batch.targets, where=batch.mask)
            return carry, {"loss": masked_mean(loss, batch.mask)}

        _, info = one_pass(setup, step, None, data)
        return (), class_means(of_means, described, download, data), info

    def aggregate(
        state: Variables,
        uploads: Mapping[str, Prototypes],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> Variables:
        head = make_head(state["params"]["head"], gathered(uploads, weights), data.key)
        return {**state, "params": {**state["params"], "head": head}}

    return FederatedAlgorithm(
        init=lambda run_key: model.init(run_key, setup.sample_shape),
        download=lambda state, role: state,
        clients=dict.fromkeys(ROLES, broadcast_client(model, update)),
        aggregate=aggregate,
        server_trains=server_trains,
    )


def fit(
    head: Params,
    features: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    l2: float | jax.Array,
    steps: int,
) -> tuple[Params, jax.Array]:
    """Fits a multinomial logistic regression by L-BFGS.

    It minimises ``mean CE + l2/2 |W|^2`` over the examples where ``mask`` is true; the bias is not
    regularised. The problem is convex, so where it starts does not matter.

    Args:
      head: Where to start: ``kernel`` ``[D, C]`` and ``bias`` ``[C]``.
      features: ``[n, D]``.
      labels: ``[n]``.
      mask: ``[n]`` boolean.
      l2: Weight of the squared weights.
      steps: The most steps.

    Returns:
      The head, and its loss.
    """

    def loss(head: Params) -> jax.Array:
        values = cross_entropy_loss(layers.linear(head, features), labels, where=mask)
        return masked_mean(values, mask) + l2 / 2 * jnp.sum(head["kernel"] ** 2)

    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: tuple) -> tuple:
        number, head, state, *_ = carry
        value, gradient = value_and_grad(head, state=state)
        updates, state = tx.update(gradient, state, head, value=value, grad=gradient, value_fn=loss)
        head = optax.apply_updates(head, updates)
        slope = optax.tree.norm(optax.tree.get(state, "grad"))
        # In float32 the gradient need not get as small as `_FLAT` before rounding hides progress.
        falls = value - optax.tree.get(state, "value") > jnp.finfo(features.dtype).eps * value
        return number + 1, head, state, (slope > _FLAT) & falls

    def goes_on(carry: tuple) -> jax.Array:
        number, _, _, worthwhile = carry
        return (number < steps) & worthwhile

    begins = optax.tree.norm(jax.grad(loss)(head)) > _FLAT
    _, head, _, _ = lax.while_loop(goes_on, step, (jnp.int32(0), head, tx.init(head), begins))
    return head, loss(head)


def _untrained(width: int, num_classes: int) -> Variables:
    head = {"kernel": jnp.zeros((width, num_classes)), "bias": jnp.zeros(num_classes)}
    return {"params": {"features": {}, "head": head}}


def _flattened(images: jax.Array) -> jax.Array:
    return images.reshape(images.shape[0], -1)


def _moments(values: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns mean and standard deviation of each value; 1 where all examples are equal."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(jnp.where(mask[:, None], values, 0), 0) / count
    variance = jnp.sum(jnp.where(mask[:, None], (values - mean) ** 2, 0), 0) / count
    return {"mean": mean, "deviation": jnp.where(variance > 1e-12, jnp.sqrt(variance), 1.0)}
