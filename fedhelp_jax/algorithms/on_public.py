"""Implements learning from answers about the public images, for FedMD and FedDF."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import PublicSpec, Setup
from fedhelp_jax.algorithms.client import gradient_step, predict, public_batches
from fedhelp_jax.core.compilation import traced_once
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.random import Purpose, for_purpose
from fedhelp_jax.data.federation import Pool, PublicPool
from fedhelp_jax.models.model import Model, Variables, apply_model


def check_public(setup: Setup, name: str) -> PublicSpec:
    """Returns the public set, for methods that require one.

    Raises:
      UserError: If there is none.
    """
    if setup.public is None:
        raise UserError(f"public.name: {name} needs public images; it is none")
    return setup.public


def no_logits(setup: Setup) -> jax.Array:
    """Returns zeros of the shape of :func:`public_logits`."""
    model, public = setup.models["small"], setup.public
    images = jnp.zeros((1, *setup.sample_shape))

    def logits(key: jax.Array) -> jax.Array:
        return apply_model(model, model.init(key, setup.sample_shape), images)[0]

    shape = jax.eval_shape(logits, jax.random.key(0)).shape[1:]
    return jnp.zeros((0 if public is None else public.num_images, *shape))


def public_logits(
    setup: Setup, model: Model, variables: Variables, public: PublicPool
) -> jax.Array:
    """Returns a network's logits on all public images, in evaluation mode, ``[P, ...]``."""
    count = len(public.images)
    pool = Pool(public.images, jnp.zeros(count))  # predictions need no targets
    index = jnp.arange(count)
    return predict(model, variables, pool, index, jnp.int32(count), setup.public_batch_size)


def learn_answers(
    setup: Setup,
    model: Model,
    key: jax.Array,
    variables: Variables,
    public: PublicPool,
    steps: int | jax.Array,
    distance: Callable[[jax.Array, jax.Array], jax.Array],
) -> Variables:
    """Trains a network towards answers about the public images, with a fresh optimizer.

    The network is in evaluation mode, with the running statistics of private images, because the
    answers were computed and the network is deployed in this mode. With normalisation by the public
    batch, it would learn a different function from the one that is evaluated next time. On images
    unlike the private ones the two functions drift apart, and FedMD's logits, each the target of
    the next round, grow without bound.

    Args:
      setup: What the method is given.
      model: The network.
      key: A client's or the server's key in this round; it decides the order of the images.
      variables: The initial variables.
      public: The images, and the answers to learn.
      steps: How many batches of ``setup.public_batch_size``.
      distance: ``(logits, answers) -> [B]`` on a batch.

    Returns:
      The trained variables.
    """
    batch_at = public_batches(
        for_purpose(key, Purpose.PUBLIC_BATCHES), public, setup.public_batch_size
    )
    stats = variables["batch_stats"]

    @traced_once
    def step(i: jax.Array, carry: tuple) -> tuple:
        params, opt_state = carry
        batch = batch_at(i)
        answers = batch.answers
        assert answers is not None

        def loss_fn(params: Variables) -> tuple[jax.Array, None]:
            given = {"params": params, "batch_stats": stats}
            logits, _ = apply_model(model, given, batch.images)
            return jnp.mean(distance(logits, answers)), None

        params, opt_state, _, _ = gradient_step(setup.tx, loss_fn, params, opt_state)
        return params, opt_state

    start = (variables["params"], setup.tx.init(variables["params"]))
    params, _ = jax.lax.fori_loop(0, steps, step, start)
    return {"params": params, "batch_stats": stats}
