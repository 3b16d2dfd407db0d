"""Losses of FedHelp, each per example, unreduced and maskable.

This module stands alone: it needs JAX, optax and chex, and nothing else of the package, so that other
research can write ``from fedhelp_jax import losses``. Every function

* takes logits as ``[*B, C]`` (any leading axes, so that a segmentation map is just more of them),
* returns one value per leading index, ``[*B]``, in nats,
* takes ``where``, a boolean ``[*B]``: masked entries are exactly 0, and so are their gradients,
* computes in float32 for half-precision inputs and keeps float64,
* works under ``jit``, ``vmap`` and ``grad`` and stays finite on extreme finite logits.

Reference for all of them: FedHelp, arXiv:2412.19654, sec. 3.3 and 3.4.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class DualDistillation(NamedTuple):
    """The two losses of a large client; differentiate each by its own model's parameters."""

    proxy_loss: jax.Array
    large_loss: jax.Array


def masked_mean(values: chex.Array, where: chex.Array | None = None) -> chex.Array:
    """Mean of ``values`` over the entries where ``where`` is true; 0 where there are none.

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
    chex.assert_equal_shape((values, where))
    total = jnp.sum(jnp.where(where, values, 0))
    return total / jnp.maximum(jnp.sum(where), 1).astype(total.dtype)


def cross_entropy_loss(
    logits: chex.Array, labels: chex.Array, *, where: chex.Array | None = None
) -> chex.Array:
    """Cross-entropy of integer labels.

    ``-log softmax(logits)[labels]``

    Args:
      logits: ``[*B, C]`` unnormalised logits.
      labels: ``[*B]`` integers in ``[0, C)``; masked entries may hold anything.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` cross-entropy, nats.

    Raises:
      AssertionError: If the shapes do not match.

    Example:
      >>> cross_entropy_loss(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4).tolist()
      [1.3862999677658081, 1.3862999677658081]
    """
    logits = _at_least_float32(logits)
    chex.assert_equal_shape_prefix((logits, labels), labels.ndim)
    logits, where = _hide_masked(logits, where)
    labels = jnp.where(where, labels, 0)
    values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(where, values, 0)


def distillation_loss(
    student_logits: chex.Array,
    teacher_logits: chex.Array,
    *,
    temperature: float = 1.0,
    where: chex.Array | None = None,
) -> chex.Array:
    """Knowledge distillation: the student learns the teacher's softened probabilities.

    ``T^2 KL( softmax(teacher / T) || softmax(student / T) )``

    The factor ``T^2`` keeps the size of the gradient when ``T`` changes. No gradient reaches the
    teacher.

    Args:
      student_logits: ``[*B, C]`` unnormalised logits.
      teacher_logits: ``[*B, C]`` unnormalised logits.
      temperature: ``T > 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` divergence, nats, at least 0 up to rounding.

    Raises:
      AssertionError: If the shapes do not match.
      ValueError: If ``temperature`` is a Python number and not positive.

    References:
      Hinton et al., arXiv:1503.02531; FedHelp, arXiv:2412.19654, sec. 3.3 and 3.4.

    Example:
      >>> distillation_loss(jnp.zeros((1, 2)), jnp.array([[0.0, jnp.log(3.0)]])).round(4).tolist()
      [0.13079999387264252]
    """
    _check_temperature(temperature)
    student_logits = _at_least_float32(student_logits)
    teacher_logits = jax.lax.stop_gradient(_at_least_float32(teacher_logits))
    chex.assert_equal_shape((student_logits, teacher_logits))
    student_logits, where = _hide_masked(student_logits, where)
    teacher_logits, _ = _hide_masked(teacher_logits, where)
    student = jax.nn.log_softmax(student_logits / temperature)
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    probabilities = jnp.exp(teacher)
    # 0 * (-inf - ...) would be NaN where a teacher's probability underflows to nothing.
    terms = jnp.where(probabilities > 0, probabilities * (teacher - student), 0)
    return jnp.where(where, temperature**2 * jnp.sum(terms, axis=-1), 0)


def ranking_distillation_loss(
    student_logits: chex.Array,
    teacher_logits: chex.Array,
    *,
    k: int,
    margin: float = 0.0,
    where: chex.Array | None = None,
) -> chex.Array:
    """Ranking distillation: only *which* classes outrank which passes from teacher to student.

    ``R_k(s; v) = 1/(k (C-k)) * sum_{t in top_k(v)} sum_{r not in top_k(v)} max(0, margin + s_r - s_t)``

    ``s`` are the student's logits and ``top_k(v)`` the teacher's ``k`` largest; equal logits rank by
    class index, the smaller first. The loss is 0 as soon as every top class leads every other one by
    ``margin``, and its gradient is zero at the hinge.

    Args:
      student_logits: ``[*B, C]`` unnormalised logits.
      teacher_logits: ``[*B, C]`` unnormalised logits; no gradient reaches them.
      k: How many classes stand above the line, ``1 <= k < C``; static.
      margin: By how much they must lead, in logits, ``>= 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` mean hinge, in logits.

    Raises:
      AssertionError: If the shapes do not match.
      ValueError: If ``k`` is not between 1 and ``C - 1``.

    References:
      FedHelp, arXiv:2412.19654, sec. 3.4 (backward distillation).

    Example:
      >>> student, teacher = jnp.array([[1.0, 2.0, 0.0]]), jnp.array([[5.0, 1.0, 0.0]])
      >>> ranking_distillation_loss(student, teacher, k=1).tolist()  # (2-1 + max(0, 0-1)) / 2
      [0.5]
    """
    num_classes = student_logits.shape[-1]
    if not 1 <= k < num_classes:
        raise ValueError(f"k must be between 1 and C - 1 = {num_classes - 1}, got {k}")
    student_logits = _at_least_float32(student_logits)
    teacher_logits = jax.lax.stop_gradient(_at_least_float32(teacher_logits))
    chex.assert_equal_shape((student_logits, teacher_logits))
    student_logits, where = _hide_masked(student_logits, where)
    # lax.top_k puts the smaller index first among equals.
    _, order = jax.lax.top_k(teacher_logits, k)
    is_top = jnp.any(jax.nn.one_hot(order, num_classes, dtype=bool), axis=-2)
    pair = is_top[..., :, None] & ~is_top[..., None, :]
    lead = student_logits[..., :, None] - student_logits[..., None, :]
    # jax.nn.relu, not jnp.maximum: its gradient at 0 is 0, not one half.
    hinge = jnp.where(pair, jax.nn.relu(margin - lead), 0)
    return jnp.where(where, jnp.sum(hinge, axis=(-2, -1)) / (k * (num_classes - k)), 0)


def auxiliary_loss(
    public_logits: chex.Array,
    labels: chex.Array | None,
    fm_student_logits: chex.Array,
    fm_logits: chex.Array,
    *,
    lambda_fm: float = 1.0,
    temperature: float = 1.0,
    where: chex.Array | None = None,
) -> chex.Array:
    """A small client's loss on public images: their labels, and the foundation model's answers.

    ``CE(public_logits, labels) + lambda_fm * T^2 KL( softmax(fm_logits / T) || softmax(fm_student_logits / T) )``

    Args:
      public_logits: ``[*B, P]`` the surrogate's logits over the public labels.
      labels: ``[*B]`` integer public labels, or None where they are unknown (drops the first term).
      fm_student_logits: ``[*B, F]`` the surrogate's logits over the foundation model's classes. The
        same array as ``public_logits`` where both label spaces are one.
      fm_logits: ``[*B, F]`` the foundation model's stored logits; no gradient reaches them.
      lambda_fm: Weight of the foundation model's term; may be traced.
      temperature: ``T > 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` loss, nats.

    Raises:
      AssertionError: If the shapes do not match.
      ValueError: If ``temperature`` is a Python number and not positive.

    References:
      FedHelp, arXiv:2412.19654, sec. 3.3 (knowledge-guided surrogate training).

    Example:
      >>> z = jnp.zeros((1, 2))
      >>> auxiliary_loss(z, jnp.array([1]), z, z).round(4).tolist()
      [0.6930999755859375]
    """
    loss = lambda_fm * distillation_loss(
        fm_student_logits, fm_logits, temperature=temperature, where=where
    )
    if labels is not None:
        loss += cross_entropy_loss(public_logits, labels, where=where)
    return loss


def asymmetric_dual_distillation(
    proxy_train_logits: chex.Array,
    large_eval_logits: chex.Array,
    large_train_logits: chex.Array,
    proxy_eval_logits: chex.Array,
    labels: chex.Array,
    *,
    k: int,
    lambda_f: float = 1.0,
    lambda_b: float = 0.2,
    temperature: float = 1.0,
    margin: float = 0.0,
    where: chex.Array | None = None,
) -> DualDistillation:
    """Both losses of a large client: the large model teaches in full, the proxy only ranks.

    ``proxy_loss = CE(proxy_train, y) + lambda_f * T^2 KL( softmax(large_eval / T) || softmax(proxy_train / T) )``

    ``large_loss = CE(large_train, y) + lambda_b * R_k(large_train; proxy_eval)``

    "train" and "eval" say in which mode a network made the logits. Whatever stands on a teacher's
    side is under ``stop_gradient``, so the sum of both may be differentiated by both models' parameters
    at once. FedHelp itself takes the two steps one after the other, the second with the proxy as the
    first left it; each step then uses one of the two fields.

    Args:
      proxy_train_logits: ``[*B, C]`` the proxy being trained.
      large_eval_logits: ``[*B, C]`` the large model as a teacher.
      large_train_logits: ``[*B, C]`` the large model being trained.
      proxy_eval_logits: ``[*B, C]`` the proxy as a teacher.
      labels: ``[*B]`` integers in ``[0, C)``.
      k: Classes above the line in the ranking, ``1 <= k < C``; static.
      lambda_f: Weight of the forward distillation; may be traced.
      lambda_b: Weight of the backward ranking; may be traced.
      temperature: ``T > 0``; may be traced.
      margin: Margin of the ranking, in logits; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``DualDistillation(proxy_loss, large_loss)``, each ``[*B]``, nats.

    Raises:
      AssertionError: If the shapes do not match.
      ValueError: If ``k`` is not between 1 and ``C - 1`` or a Python ``temperature`` is not positive.

    References:
      FedHelp, arXiv:2412.19654, sec. 3.4 (asymmetric dual knowledge distillation).

    Example:
      >>> z = jnp.zeros((1, 2))
      >>> pair = asymmetric_dual_distillation(z, z, z, z, jnp.array([0]), k=1)
      >>> pair.proxy_loss.round(4).tolist(), pair.large_loss.round(4).tolist()
      ([0.6930999755859375], [0.6930999755859375])
    """
    forward = distillation_loss(
        proxy_train_logits, large_eval_logits, temperature=temperature, where=where
    )
    backward = ranking_distillation_loss(
        large_train_logits, proxy_eval_logits, k=k, margin=margin, where=where
    )
    return DualDistillation(
        proxy_loss=cross_entropy_loss(proxy_train_logits, labels, where=where) + lambda_f * forward,
        large_loss=cross_entropy_loss(large_train_logits, labels, where=where) + lambda_b * backward,
    )


def _at_least_float32(x: chex.Array) -> chex.Array:
    return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _hide_masked(logits: chex.Array, where: chex.Array | None) -> tuple[chex.Array, chex.Array]:
    """Zeroes masked rows before any arithmetic: a NaN there would poison the gradients."""
    if where is None:
        return logits, jnp.ones(logits.shape[:-1], bool)
    chex.assert_shape(where, logits.shape[:-1])
    return jnp.where(where[..., None], logits, 0), where


def _check_temperature(temperature: chex.Numeric) -> None:
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
