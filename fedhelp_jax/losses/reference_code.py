"""Provides the odd variants of FedHelp's losses in the authors' released code, for comparison only.

FedHelp here trains with :mod:`fedhelp_jax.losses`, and uses these only if its setting
``released_code`` asks for them. They are what the release (github.com/JackqqWang/medfed_code,
``update.py``) minimises instead, so that the two can be compared. The conventions are those of
:mod:`fedhelp_jax.losses`: logits ``[*B, C]``, one value per leading index, masked entries exactly
0, float32 for half precision.

The release reduces over a batch in two ways. Each function states which one gives the release's
scalar, the mean over the examples (:func:`fedhelp_jax.losses.masked_mean`) or their sum:

* ``student_ranking_loss``: the sum of :func:`released_ranking_loss`.
* ``KLDivLoss()(log_softmax(s / T), softmax(t / T))``: the mean of
  :func:`released_distillation_loss`.
* ``KLDivLoss()(log_softmax(s), z)``: the mean of :func:`released_stored_logits_loss`.
* ``total_large_loss``: the three parts of :func:`released_large_loss`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.losses.classification import cross_entropy_loss, ranking_distillation_loss
from fedhelp_jax.losses.common import at_least_float32, check_shape, divergence_terms, hide_masked


class ReleasedLargeLoss(NamedTuple):
    """The parts of the large model's loss in the release, which are reduced in different ways."""

    cross_entropy: jax.Array
    distillation: jax.Array
    ranking: jax.Array


def released_ranking_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    k: int,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns the ranking loss with the sign inverted, which punishes agreeing with the teacher.

    ``1/(2 k) * sum_{t in top_k(v)} sum_{r not in top_k(v)} max(0, s_t - s_r)``

    ``s`` are the student's logits and ``top_k(v)`` the classes of the teacher's ``k`` largest
    logits. The **sum** over the batch is the release's scalar, so its weight relative to the other
    terms grows with the batch. It is ``(C - k) / 2`` times
    :func:`fedhelp_jax.losses.ranking_distillation_loss` of the negated student logits, and 0 if the
    student reverses the teacher's order.

    Args:
      student_logits: ``[*B, C]`` unnormalised logits of the large model.
      teacher_logits: ``[*B, C]`` unnormalised logits of the proxy; no gradient reaches them. The
        release swaps the names of these two.
      k: Number of top classes, ``1 <= k < C``; static.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` hinges, in logits; their sum is the release's loss.

    Raises:
      ValueError: If the shapes do not match, or ``k`` is not between 1 and ``C - 1``.

    References:
      ``student_ranking_loss`` of the released code; FedHelp, arXiv:2412.19654, sec. 3.4.

    Example:
      >>> student, teacher = jnp.array([[1.0, 2.0, 0.0]]), jnp.array([[5.0, 1.0, 0.0]])
      >>> released_ranking_loss(student, teacher, k=1).tolist()  # (max(0, 1-2) + 1-0) / 2
      [0.5]
    """
    student_logits = jnp.asarray(student_logits)
    inverted = ranking_distillation_loss(-student_logits, teacher_logits, k=k, where=where)
    return inverted * ((student_logits.shape[-1] - k) / 2)


def released_distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns a distillation loss divided by the number of classes, with gradients for both sides.

    ``1/C * KL( softmax(teacher / T) || softmax(student / T) )``

    The **mean** over the batch is PyTorch's ``KLDivLoss(reduction="mean")``, which divides by all
    ``B * C`` entries. It has no factor ``T^2``, so it is ``1 / (C T^2)`` times
    :func:`fedhelp_jax.losses.distillation_loss`. The teacher is not detached. Put it under
    ``jax.lax.stop_gradient`` where the release computes it without gradient, which is when the
    proxy learns.

    Args:
      student_logits: ``[*B, C]`` unnormalised logits.
      teacher_logits: ``[*B, C]`` unnormalised logits; the gradient reaches them.
      temperature: ``T > 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]`` divergence divided by ``C``, in nats; the mean is the release's loss.

    Raises:
      ValueError: If the shapes do not match, or a Python ``temperature`` is not positive.

    References:
      ``distillation_criterion`` of the released code; FedHelp, arXiv:2412.19654, sec. 3.4.

    Example:
      >>> student, teacher = jnp.zeros((1, 2)), jnp.array([[0.0, jnp.log(3.0)]])
      >>> print(f"{float(released_distillation_loss(student, teacher)[0]):.4f}")
      0.0654
    """
    terms = divergence_terms(student_logits, teacher_logits, temperature, where)
    return jnp.mean(terms, axis=-1)


def released_stored_logits_loss(
    student_logits: jax.Array,
    stored_logits: jax.Array,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns a distillation loss that takes stored logits for probabilities, without a softmax.

    ``1/C * sum_c z_c (log max(z_c, tiny) - log softmax(student)_c)``

    The first term, ``z_c log z_c``, is 0 for ``z_c <= 0``; the second always counts.

    The **mean** over the batch is the release's scalar. ``z`` is not a distribution, so this is not
    a divergence: it may be negative, and its gradient scales with the logits. It is all that a
    small client of the release learns from a public image, whose label is not used.

    Args:
      student_logits: ``[*B, C]`` unnormalised logits.
      stored_logits: ``[*B, C]`` the foundation model's logits ``z``; no gradient reaches them.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``[*B]``, in logits times nats; the mean is the release's loss. Unlike the other losses, it is
      bilinear in the logits, and therefore overflows where their product does.

    Raises:
      ValueError: If the shapes do not match.

    References:
      ``small_client_update_weights_final`` of the released code; FedHelp, arXiv:2412.19654,
      sec. 3.3.

    Notes:
      Where a stored logit is negative, PyTorch's ``KLDivLoss`` gives NaN, but its gradient equals
      that of this loss. Older versions dropped both terms (pytorch/pytorch, issue 69230).

    Example:
      >>> print(released_stored_logits_loss(jnp.zeros((1, 2)), jnp.array([[1.0, -2.0]])).round(4))
      [-0.3466]
    """
    student_logits = at_least_float32(student_logits)
    stored_logits = jax.lax.stop_gradient(at_least_float32(stored_logits))
    check_shape("stored_logits", stored_logits, student_logits.shape)
    student_logits, where = hide_masked(student_logits, where)
    stored_logits, _ = hide_masked(stored_logits, where)
    tiny = jnp.finfo(stored_logits.dtype).tiny
    log_stored = jnp.where(stored_logits > 0, jnp.log(jnp.maximum(stored_logits, tiny)), 0)
    terms = stored_logits * (log_stored - jax.nn.log_softmax(student_logits))
    return jnp.where(where, jnp.mean(terms, axis=-1), 0)


def released_large_loss(
    large_eval_logits: jax.Array,
    large_train_logits: jax.Array,
    proxy_eval_logits: jax.Array,
    labels: jax.Array,
    *,
    k: int,
    temperature: float = 1.0,
    where: jax.Array | None = None,
) -> ReleasedLargeLoss:
    """Returns the three parts of the loss that the release minimises over the large model.

    * ``cross_entropy = CE(large_eval, y)``, which has no gradient, because its logits have none.
    * ``distillation = 1/C * KL( softmax(large_train / T) || softmax(proxy_eval / T) )``, the loss
      that teaches the proxy, here minimised over the teacher, which is not detached.
    * ``ranking``: :func:`released_ranking_loss` of ``large_train``, with ``proxy_eval`` as teacher.

    The release's scalar is ``mean(cross_entropy) + mean(distillation) + 0.2 * sum(ranking)``.
    Nothing in its gradient favours the correct label.

    Args:
      large_eval_logits: ``[*B, C]`` logits of the large model as a teacher; no gradient reaches
        them.
      large_train_logits: ``[*B, C]`` logits of the large model being trained.
      proxy_eval_logits: ``[*B, C]`` logits of the proxy after its step; no gradient reaches them.
      labels: ``[*B]`` integers in ``[0, C)``.
      k: Number of top classes in the ranking, ``1 <= k < C``; static.
      temperature: ``T > 0``; may be traced.
      where: ``[*B]`` boolean mask, or None.

    Returns:
      ``ReleasedLargeLoss(cross_entropy, distillation, ranking)``, each ``[*B]``: nats, nats,
      logits.

    Raises:
      ValueError: If the shapes do not match, ``k`` is not between 1 and ``C - 1``, or a Python
        ``temperature`` is not positive.

    References:
      ``large_client_update_weights`` of the released code; FedHelp, arXiv:2412.19654, sec. 3.4.

    Example:
      >>> agreeing = jnp.array([[1.0, 0.0]])
      >>> parts = released_large_loss(agreeing, agreeing, agreeing, jnp.array([0]), k=1)
      >>> [f"{float(part[0]):.3f}" for part in parts]
      ['0.313', '0.000', '0.500']
    """
    large_eval_logits = jax.lax.stop_gradient(large_eval_logits)
    proxy_eval_logits = jax.lax.stop_gradient(proxy_eval_logits)
    return ReleasedLargeLoss(
        cross_entropy=cross_entropy_loss(large_eval_logits, labels, where=where),
        distillation=released_distillation_loss(
            proxy_eval_logits, large_train_logits, temperature=temperature, where=where
        ),
        ranking=released_ranking_loss(large_train_logits, proxy_eval_logits, k=k, where=where),
    )
