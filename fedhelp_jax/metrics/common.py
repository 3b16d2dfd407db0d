"""What all metrics share."""

import jax
import jax.numpy as jnp


def finite_examples(logits: jax.Array) -> jax.Array:
    """Which examples have only finite logits, boolean ``[n]``, of logits ``[n, ..., C]``."""
    return jnp.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator``, NaN where nothing is counted."""
    return jnp.where(denominator > 0, numerator / jnp.maximum(denominator, 1), jnp.nan)


def mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """The mean of the values where ``where`` is true, NaN if it nowhere is."""
    return ratio(jnp.sum(jnp.where(where, values, 0)), jnp.sum(where))
