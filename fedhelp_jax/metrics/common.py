"""Provides what all metrics share."""

import jax
import jax.numpy as jnp


def finite_examples(logits: jax.Array) -> jax.Array:
    """Returns which examples have only finite logits, ``[n]``, for logits ``[n, ..., C]``."""
    return jnp.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Returns ``numerator / denominator``, or NaN where the denominator is 0."""
    return jnp.where(denominator > 0, numerator / jnp.maximum(denominator, 1), jnp.nan)


def mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """Returns the mean of the values where ``where`` is true, or NaN if it is true nowhere."""
    return ratio(jnp.sum(jnp.where(where, values, 0)), jnp.sum(where))
