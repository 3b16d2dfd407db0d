"""Provides FedHelp's losses on class logits; their conventions are in :mod:`fedhelp_jax.losses`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.losses.common import (
    at_least_float32,
    check_shape,
    divergence_terms,
    hide_masked,
)


class DualDistillation(NamedTuple):
    """The two losses of a large client, each to be differentiated by its own model's parameters."""

    proxy_loss: jax.Array
    large_loss: jax.Array


def cross_entropy_loss(
    logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Returns the cross-entropy of integer labels.

    ``-log softmax(logits)[labels]``

    Args:
      logits: ``[*B, C]`` unnormalised logits.
      labels: ``[*B]`` integers in ``[0, C)``; masked entries may hold anything.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` cross-entropy, nats.

    Raises:
      ValueError: If the shapes do not match.

    Example:
      >>> jnp.exp(cross_entropy_loss(jnp.zeros((2, 4)), jnp.array([0, 3]))).round(3).tolist()
      [4.0, 4.0]
    """
    logits = at_least_float32(logits)
    check_shape("labels", labels, logits.shape[:-1])
    logits, where = hide_masked(logits, where)
    labels = jnp.where(where, labels, 0)
    # logsumexp(logits) minus the label's logit would lose all precision when both are large.
    log_probs = jax.nn.log_softmax(logits)
    values = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return jnp.where(where, values, 0)


def distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns the knowledge-distillation loss, towards the teacher's softened probabilities.

    ``T^2 KL( softmax(teacher / T) || softmax(student / T) )``

    The factor ``T^2`` preserves the scale of the gradient when ``T`` changes. No gradient reaches
    the teacher.

    Args:
      student_logits: ``[*B, C]`` unnormalised logits.
      teacher_logits: ``[*B, C]`` unnormalised logits.
      temperature: ``T > 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` divergence, nats, at least 0 up to rounding.

    Raises:
      ValueError: If the shapes do not match, or a Python ``temperature`` is not positive.

    References:
      Hinton et al., arXiv:1503.02531; FedHelp, arXiv:2412.19654, sec. 3.3 and 3.4.

    Example:
      >>> teacher = jnp.log(jnp.array([[0.25, 0.75]]))
      >>> print(distillation_loss(jnp.zeros((1, 2)), teacher).round(4))
      [0.1308]
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    terms = divergence_terms(student_logits, teacher_logits, temperature, where)
    return temperature**2 * jnp.sum(terms, axis=-1)


def ranking_distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    k: int,
    margin: float | jax.Array = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns the ranking-distillation loss: the student learns only *which* classes rank higher.

    ``R_k(s; v) = 1/(k (C-k)) * sum_{t in top_k(v), r not} max(0, margin + s_r - s_t)``

    ``s`` are the student's logits and ``top_k(v)`` the classes of the teacher's ``k`` largest
    logits; equal logits rank by class index, the smaller first. The loss is 0 if every top class
    leads every other class by ``margin``, and its gradient is zero at the hinge.

    Args:
      student_logits: ``[*B, C]`` unnormalised logits.
      teacher_logits: ``[*B, C]`` unnormalised logits; no gradient reaches them.
      k: Number of top classes, ``1 <= k < C``; static.
      margin: The lead that they need, in logits, ``>= 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` mean hinge, in logits.

    Raises:
      ValueError: If the shapes do not match, or ``k`` is not between 1 and ``C - 1``.

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
    teacher_logits = at_least_float32(teacher_logits)
    check_shape("teacher_logits", teacher_logits, student_logits.shape)
    # lax.top_k puts the smaller index first among equal values, but orders -0 below 0. Here the two
    # are equal.
    _, order = jax.lax.top_k(jnp.where(teacher_logits == 0, 0, teacher_logits), k)
    top = jnp.any(jax.nn.one_hot(order, num_classes, dtype=bool), axis=-2)
    return set_ranking_loss(student_logits, top, margin=margin, where=where)


def set_ranking_loss(
    student_logits: jax.Array,
    top: jax.Array,
    *,
    margin: float | jax.Array = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns the ranking-distillation loss for a given set of top classes, of any size.

    ``1/(|S| (C-|S|)) * sum_{t in S, r not} max(0, margin + s_r - s_t)``

    Args:
      student_logits: ``[*B, C]`` unnormalised logits ``s``.
      top: ``[*B, C]`` boolean, the classes ``S`` that should outrank the others.
      margin: The lead that they need, in logits, ``>= 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` mean hinge, in logits; 0 where ``S`` is empty or all classes.

    Raises:
      ValueError: If the shapes do not match.

    References:
      FedType, arXiv:2407.03247, where ``S`` is a conformal set. In
      :func:`ranking_distillation_loss`, ``S`` is a top-k set.

    Example:
      >>> set_ranking_loss(jnp.array([[1.0, 2.0, 0.0]]), jnp.array([[True, False, False]])).tolist()
      [0.5]
    """
    student_logits = at_least_float32(student_logits)
    check_shape("top", top, student_logits.shape)
    student_logits, where = hide_masked(student_logits, where)
    pair = top[..., :, None] & ~top[..., None, :]
    lead = student_logits[..., :, None] - student_logits[..., None, :]
    # jax.nn.relu instead of jnp.maximum, because its gradient at 0 is 0 instead of one half.
    hinge = jnp.where(pair, jax.nn.relu(margin - lead), 0)
    pairs = jnp.maximum(jnp.sum(pair, axis=(-2, -1)), 1).astype(hinge.dtype)
    return jnp.where(where, jnp.sum(hinge, axis=(-2, -1)) / pairs, 0)


def auxiliary_loss(
    public_logits: jax.Array,
    labels: jax.Array | None,
    fm_student_logits: jax.Array,
    fm_logits: jax.Array,
    *,
    lambda_fm: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns a small client's loss on public images: on their labels and the stored answers.

    ``CE(public_logits, labels)
    + lambda_fm * T^2 KL( softmax(fm_logits / T) || softmax(fm_student_logits / T) )``

    Args:
      public_logits: ``[*B, P]`` logits of the surrogate over the public labels.
      labels: ``[*B]`` integer public labels, or None if they are unknown (drops the first term).
      fm_student_logits: ``[*B, F]`` logits of the surrogate over the foundation model's classes;
        the same array as ``public_logits`` if both share one label space.
      fm_logits: ``[*B, F]`` stored logits of the foundation model; no gradient reaches them.
      lambda_fm: Weight of the foundation model's term; may be traced.
      temperature: ``T > 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` loss, nats.

    Raises:
      ValueError: If the shapes do not match, or a Python ``temperature`` is not positive.

    References:
      FedHelp, arXiv:2412.19654, sec. 3.3 (knowledge-guided surrogate training).

    Example:
      >>> z = jnp.zeros((1, 2))
      >>> print(auxiliary_loss(z, jnp.array([1]), z, z).round(4))
      [0.6931]
    """
    loss = lambda_fm * distillation_loss(
        fm_student_logits, fm_logits, temperature=temperature, where=where
    )
    if labels is not None:
        loss += cross_entropy_loss(public_logits, labels, where=where)
    return loss


def asymmetric_dual_distillation(
    proxy_train_logits: jax.Array,
    large_eval_logits: jax.Array,
    large_train_logits: jax.Array,
    proxy_eval_logits: jax.Array,
    labels: jax.Array,
    *,
    k: int,
    lambda_f: float | jax.Array = 1.0,
    lambda_b: float | jax.Array = 0.2,
    temperature: float | jax.Array = 1.0,
    margin: float | jax.Array = 0.0,
    where: jax.Array | None = None,
) -> DualDistillation:
    """Returns both losses of a large client: its model teaches logits, the proxy only rankings.

    ``proxy_loss = CE(proxy_train, y)
    + lambda_f * T^2 KL( softmax(large_eval / T) || softmax(proxy_train / T) )``

    ``large_loss = CE(large_train, y) + lambda_b * R_k(large_train; proxy_eval)``

    "train" and "eval" are the modes in which a network computed the logits. The teacher's logits
    are under ``stop_gradient``, so the sum of both losses may be differentiated by both models'
    parameters at once. FedHelp itself takes two steps, one after the other, and the second uses the
    proxy after the first; each step then needs one of the two fields.

    Args:
      proxy_train_logits: ``[*B, C]`` logits of the proxy being trained.
      large_eval_logits: ``[*B, C]`` logits of the large model as a teacher.
      large_train_logits: ``[*B, C]`` logits of the large model being trained.
      proxy_eval_logits: ``[*B, C]`` logits of the proxy as a teacher.
      labels: ``[*B]`` integers in ``[0, C)``.
      k: Number of top classes in the ranking, ``1 <= k < C``; static.
      lambda_f: Weight of the forward distillation; may be traced.
      lambda_b: Weight of the backward ranking; may be traced.
      temperature: ``T > 0``; may be traced.
      margin: Margin of the ranking, in logits; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``DualDistillation(proxy_loss, large_loss)``, each ``[*B]``, nats.

    Raises:
      ValueError: If the shapes do not match, ``k`` is not between 1 and ``C - 1``, or a Python
        ``temperature`` is not positive.

    References:
      FedHelp, arXiv:2412.19654, sec. 3.4 (asymmetric dual knowledge distillation).

    Example:
      >>> z = jnp.zeros((1, 2))
      >>> pair = asymmetric_dual_distillation(z, z, z, z, jnp.array([0]), k=1)
      >>> print(pair.proxy_loss.round(4), pair.large_loss.round(4))
      [0.6931] [0.6931]
    """
    forward = distillation_loss(
        proxy_train_logits, large_eval_logits, temperature=temperature, where=where
    )
    backward = ranking_distillation_loss(
        large_train_logits, proxy_eval_logits, k=k, margin=margin, where=where
    )
    return DualDistillation(
        proxy_loss=cross_entropy_loss(proxy_train_logits, labels, where=where) + lambda_f * forward,
        large_loss=cross_entropy_loss(large_train_logits, labels, where=where)
        + lambda_b * backward,
    )
