"""Implements what one client does, as pure functions: batches, gradient steps, predictions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fedhelp_jax.core.compilation import traced_once, warn_if_exposed
from fedhelp_jax.data.federation import ClientData, Pool, PublicPool, normalize_images
from fedhelp_jax.models.model import Model, Variables, apply_model
from fedhelp_jax.typing import Carry, ClientState, OptState, Params, PyTree, Upload

Info = dict[str, jax.Array]
Updated = tuple[ClientState, Upload, Info]  # what a client returns from its round


class Batch(NamedTuple):
    """Private examples: images float ``[B, *spatial, C]``, targets ``[B, ...]``, mask ``[B]``."""

    images: jax.Array
    targets: jax.Array
    mask: jax.Array


class PublicBatch(NamedTuple):
    """Public examples: images float ``[B, *spatial, C]``; labels, answers ``[B, ...]``, or None."""

    images: jax.Array
    labels: jax.Array | None
    answers: jax.Array | None


def adam_l2(learning_rate: float | jax.Array, weight_decay: float) -> optax.GradientTransformation:
    """Returns Adam with weight decay added to gradients, like ``torch.optim.Adam``, not AdamW."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))


def sgd_l2(learning_rate: float | jax.Array, weight_decay: float) -> optax.GradientTransformation:
    """Returns plain SGD with weight decay added to the gradient."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate))


def apply_gradient(tx: optax.GradientTransformation, params: Params, gradient: Params) -> Params:
    """Takes one step of a stateless optimizer, such as :func:`sgd_l2`."""
    updates, _ = tx.update(gradient, tx.init(params), params)
    return optax.apply_updates(params, updates)


def gradient_step(
    tx: optax.GradientTransformation,
    loss_fn: Callable[[Params], tuple[jax.Array, PyTree]],
    params: Params,
    opt_state: OptState,
) -> tuple[Params, OptState, jax.Array, PyTree]:
    """Takes one optimizer step on exactly the leaves of ``params``.

    Args:
      tx: The optimizer.
      loss_fn: ``params -> (scalar loss, aux)``.
      params: The parameters to update.
      opt_state: The optimizer's state for ``params``.

    Returns:
      ``(params, opt_state, loss, aux)``; ``loss`` and ``aux`` are those before the step.
    """
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, aux


def shuffled(key: jax.Array, size: jax.Array | int, length: int) -> jax.Array:
    """Returns the positions ``0..size-1`` in random order, then the rest; int32 ``[length]``.

    It is a stable argsort of random bits. Unlike that of ``jax.random.permutation``, the order does
    not depend on the padding ``length - size``.
    """
    bits = jax.random.bits(key, (length,))
    valid = jnp.arange(length) < size
    last = jnp.array(jnp.iinfo(bits.dtype).max, bits.dtype)
    return jnp.argsort(jnp.where(valid, bits, last), stable=True)


def run_epochs(
    step: Callable[[Carry, Batch, jax.Array], tuple[Carry, Info]],
    carry: Carry,
    data: ClientData,
    key: jax.Array,
    *,
    batch_size: int,
    local_epochs: int,
) -> tuple[Carry, Info]:
    """Runs ``step`` over every private batch of ``local_epochs`` epochs, each in a fresh order.

    The number of steps follows from the client's own data: ``local_epochs * ceil(size /
    batch_size)``. The last, shorter batch is kept and masked.

    Args:
      step: ``(carry, batch, step_index) -> (carry, info)``; ``info`` holds means over the batch.
      carry: What the method trains.
      data: The client's data.
      key: Decides the order of the examples.
      batch_size: ``B``.
      local_epochs: Number of epochs.

    Returns:
      ``(carry, info)``, with ``info`` averaged over the examples seen; zeros for a client without
      examples.
    """
    warn_if_exposed()
    step = traced_once(step)
    steps = (data.size + batch_size - 1) // batch_size
    length = data.index.shape[0]
    # dynamic_slice would silently clamp the start of a slice that reached past the end.
    padded = -(-length // batch_size) * batch_size

    def one_epoch(epoch: jax.Array, state: tuple[Carry, Info]) -> tuple[Carry, Info]:
        order = data.index[shuffled(jax.random.fold_in(key, epoch), data.size, length)]
        order = jnp.pad(order, (0, padded - length))

        def one_step(i: jax.Array, state: tuple[Carry, Info]) -> tuple[Carry, Info]:
            carry, sums = state
            batch = _gather(data, order, i * batch_size, batch_size)
            carry, info = step(carry, batch, epoch * steps + i)
            count = jnp.sum(batch.mask)
            return carry, jax.tree.map(lambda s, value: s + value * count, sums, info)

        return lax.fori_loop(0, steps, one_step, state)

    def first_step() -> Info:
        # Uses the very arrays of the loop: with shapes alone, the step would be traced again.
        order = jnp.zeros_like(data.index, shape=(padded,))
        zero = jnp.zeros_like(data.size)
        return step(carry, _gather(data, order, zero, batch_size), zero)[1]

    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(first_step))
    carry, sums = lax.fori_loop(0, local_epochs, one_epoch, (carry, sums))
    return carry, jax.tree.map(lambda s: s / jnp.maximum(data.size * local_epochs, 1), sums)


def _gather(data: ClientData, order: jax.Array, start: jax.Array | int, batch_size: int) -> Batch:
    index = lax.dynamic_slice_in_dim(order, start, batch_size)
    mask = start + jnp.arange(batch_size) < data.size
    return Batch(normalize_images(data.pool.images[index]), data.pool.targets[index], mask)


def public_batches(
    key: jax.Array, public: PublicPool, batch_size: int
) -> Callable[[jax.Array], PublicBatch]:
    """Returns ``step_index -> PublicBatch``, which cycles through the public set in random order.

    The order is the same in every cycle.
    """
    length = public.images.shape[0]
    order = shuffled(key, length, length)

    def batch(step: jax.Array) -> PublicBatch:
        index = order[(step * batch_size + jnp.arange(batch_size)) % length]
        labels = None if public.labels is None else public.labels[index]
        answers = None if public.answers is None else public.answers[index]
        return PublicBatch(normalize_images(public.images[index]), labels, answers)

    return batch


def predict(
    model: Model,
    variables: Variables,
    pool: Pool,
    index: jax.Array,
    size: jax.Array,
    batch_size: int,
) -> jax.Array:
    """Returns a model's logits on the pool entries ``index``, in evaluation mode.

    Args:
      model: The network.
      variables: The variables of the network.
      pool: The examples.
      index: int32 ``[n]`` positions in the pool, of which the first ``size`` are real.
      size: Number of real positions.
      batch_size: Examples at a time.

    Returns:
      ``[n, ...]`` logits; zeros past ``size`` rounded up to whole batches.
    """
    warn_if_exposed()
    length = index.shape[0]
    padded = jnp.pad(index, (0, -length % batch_size))

    @traced_once
    def logits_at(start: jax.Array | int) -> jax.Array:
        batch = lax.dynamic_slice_in_dim(padded, start, batch_size)
        return apply_model(model, variables, normalize_images(pool.images[batch]))[0]

    def one_batch(i: jax.Array, out: jax.Array) -> jax.Array:
        start = i * batch_size
        return lax.dynamic_update_slice_in_dim(out, logits_at(start), start, axis=0)

    shape = jax.eval_shape(lambda: logits_at(jnp.zeros_like(size)))
    out = jnp.zeros((padded.shape[0], *shape.shape[1:]), shape.dtype)
    out = lax.fori_loop(0, (size + batch_size - 1) // batch_size, one_batch, out)
    return out[:length]
