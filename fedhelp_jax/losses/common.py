"""Provides what all losses share: the masked mean, the compute dtype and checks of shapes."""

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Returns the mean of ``values`` over the entries where ``where`` is true; 0 without any.

    Args:
      values: ``[*B]`` any real values.
      where: ``[*B]`` boolean mask, or None for all entries.

    Returns:
      A scalar in the unit of ``values``.

    Example:
      >>> float(masked_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])))
      2.0
    """
    if where is None:
        return jnp.mean(values)
    check_shape("where", where, values.shape)
    total = jnp.sum(jnp.where(where, values, 0))
    return total / jnp.maximum(jnp.sum(where), 1).astype(total.dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns ``x`` in float32 if it has half precision, otherwise unchanged."""
    return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def check_temperature(temperature: float | jax.Array) -> None:
    """Checks that a temperature is positive if it is a Python number; traced ones pass."""
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def check_shape(name: str, value: jax.Array, shape: tuple[int, ...]) -> None:
    """Checks the shape of a named argument."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")


def divergence_terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array,
    where: jax.Array | None,
) -> jax.Array:
    """Returns the terms ``[*B, C]`` of ``KL( softmax(teacher / T) || softmax(student / T) )``."""
    check_temperature(temperature)
    student_logits = at_least_float32(student_logits)
    teacher_logits = at_least_float32(teacher_logits)
    check_shape("teacher_logits", teacher_logits, student_logits.shape)
    student_logits, where = hide_masked(student_logits, where)
    teacher_logits, _ = hide_masked(teacher_logits, where)
    student = jax.nn.log_softmax(student_logits / temperature)
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    probabilities = jnp.exp(teacher)
    # 0 * (-inf - ...) would be NaN where a teacher's probability underflows to 0.
    terms = jnp.where(probabilities > 0, probabilities * (teacher - student), 0)
    return jnp.where(where[..., None], terms, 0)


def hide_masked(logits: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Zeroes masked rows before any arithmetic, because a NaN there would poison the gradients."""
    if where is None:
        return logits, jnp.ones(logits.shape[:-1], bool)
    check_shape("where", where, logits.shape[:-1])
    return jnp.where(where[..., None], logits, 0), where
