"""Provides FedHelp's losses for segmentation, over pixels (voxels) of maps of any spatial rank.

The losses build on those of :mod:`fedhelp_jax.losses` and follow the conventions stated there. A
map of logits is ``[B, *spatial, C]``. ``C = 1`` means one foreground class, with one logit ``s``
per pixel and the class probability ``sigmoid(s)``; it equals two classes with logits ``[0, s]``.
With ``C >= 2``, class 0 is the background.

Every function returns one value per example, ``[B]``, a mean over its pixels. ``where`` is boolean,
``[B]`` (examples) or ``[B, *spatial]`` (pixels); the loss of an example without any valid pixel is
exactly 0.

Reference: FedHelp, arXiv:2412.19654, sec. 3.3 and 3.4; soft Dice is that of V-Net (Milletari et
al., arXiv:1606.04797) without squares in the denominator.
"""

import jax
import jax.numpy as jnp

from fedhelp_jax.losses.classification import (
    cross_entropy_loss,
    distillation_loss,
    ranking_distillation_loss,
)
from fedhelp_jax.losses.common import at_least_float32, check_shape, check_temperature

_SMOOTH = 1.0


def mask_loss(
    logits: jax.Array, targets: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Returns the supervised loss of masks: cross-entropy plus soft Dice.

    ``C = 1``: the mean over pixels of ``BCE(s, y)``, plus
    ``1 - (2 sum p y + 1) / (sum p + sum y + 1)``.

    ``C >= 2``: the mean over pixels of the softmax cross-entropy, plus the mean of that Dice term
    over the foreground classes ``1 .. C - 1``.

    Args:
      logits: ``[B, *spatial, C]`` unnormalised logits.
      targets: ``[B, *spatial]`` integers: 0 or 1 for ``C = 1``, else in ``[0, C)``.
      where: ``[B]`` or ``[B, *spatial]`` boolean mask, or None.

    Returns:
      ``[B]`` loss: nats per pixel, plus Dice terms in ``[0, 1]``.

    Raises:
      ValueError: If the shapes do not match.

    Example:
      >>> print(mask_loss(jnp.zeros((1, 2, 1)), jnp.array([[0, 1]])).round(4))  # ln 2 + 1 - 2/3
      [1.0265]
    """
    logits, pixels = _hidden(logits, where)
    check_shape("targets", targets, logits.shape[:-1])
    targets = jnp.where(pixels, targets, 0)
    if logits.shape[-1] == 1:
        s = logits[..., 0]
        # softplus(s) - y s in a form that neither over- nor underflows.
        crossed = jax.nn.softplus(jnp.where(targets > 0, -s, s))
        dice = _soft_dice(jax.nn.sigmoid(s), (targets > 0).astype(s.dtype), pixels)
    else:
        crossed = cross_entropy_loss(logits, targets)
        probs = jax.nn.softmax(logits)
        classes = range(1, logits.shape[-1])
        terms = [
            _soft_dice(probs[..., c], (targets == c).astype(probs.dtype), pixels) for c in classes
        ]
        dice = sum(terms[1:], terms[0]) / len(terms)
    return _pixel_mean(crossed, pixels) + dice


def mask_distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns the knowledge-distillation loss of masks: a divergence averaged over pixels.

    ``C = 1``: ``T^2 KL( Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(s / T)) )``; a softmax over
    one channel would always be 1, and its gradient 0.

    ``C >= 2``: ``T^2 KL( softmax(t / T) || softmax(s / T) )``.

    Args:
      student_logits: ``[B, *spatial, C]`` unnormalised logits.
      teacher_logits: ``[B, *spatial, C]`` unnormalised logits; no gradient reaches them.
      temperature: ``T > 0``; may be traced.
      where: ``[B]`` or ``[B, *spatial]`` boolean mask, or None.

    Returns:
      ``[B]`` divergence, nats per pixel, at least 0 up to rounding.

    Raises:
      ValueError: If the shapes do not match, or a Python ``temperature`` is not positive.

    Example:
      >>> teacher = jnp.log(jnp.array([[[3.0]]]))  # a probability of 3/4
      >>> print(mask_distillation_loss(jnp.zeros((1, 1, 1)), teacher).round(4))
      [0.1308]
    """
    student_logits, pixels = _hidden(student_logits, where)
    teacher_logits, _ = _hidden(jax.lax.stop_gradient(teacher_logits), where)
    check_shape("teacher_logits", teacher_logits, student_logits.shape)
    if student_logits.shape[-1] > 1:
        values = distillation_loss(student_logits, teacher_logits, temperature=temperature)
        return _pixel_mean(values, pixels)
    check_temperature(temperature)
    s, t = student_logits[..., 0] / temperature, teacher_logits[..., 0] / temperature
    # Each probability times the difference of the logs; probabilities that underflow add nothing.
    yes = jax.nn.sigmoid(t) * (jax.nn.log_sigmoid(t) - jax.nn.log_sigmoid(s))
    no = jax.nn.sigmoid(-t) * (jax.nn.log_sigmoid(-t) - jax.nn.log_sigmoid(-s))
    return temperature**2 * _pixel_mean(yes + no, pixels)


def mask_ranking_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    k: int = 1,
    margin: float | jax.Array = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns the ranking-distillation loss of masks: ``R_k`` of each pixel, averaged over pixels.

    ``C = 1`` counts as two logits ``[0, s]``: the loss is ``max(0, margin - s)`` where the
    teacher's logit is positive, else ``max(0, margin + s)``.

    Args:
      student_logits: ``[B, *spatial, C]`` unnormalised logits.
      teacher_logits: ``[B, *spatial, C]`` unnormalised logits; no gradient reaches them.
      k: Number of top classes, ``1 <= k < max(C, 2)``; static.
      margin: The lead that they need, in logits, ``>= 0``; may be traced.
      where: ``[B]`` or ``[B, *spatial]`` boolean mask, or None.

    Returns:
      ``[B]`` mean hinge, in logits.

    Raises:
      ValueError: If the shapes do not match, or ``k`` is out of range.

    References:
      :func:`fedhelp_jax.losses.ranking_distillation_loss`.

    Example:
      >>> student, teacher = jnp.array([[[2.0], [2.0]]]), jnp.array([[[1.0], [-1.0]]])
      >>> mask_ranking_loss(student, teacher).tolist()  # agrees; 2 on the wrong side
      [1.0]
    """
    student_logits, pixels = _hidden(student_logits, where)
    teacher_logits, _ = _hidden(jax.lax.stop_gradient(teacher_logits), where)
    check_shape("teacher_logits", teacher_logits, student_logits.shape)
    if student_logits.shape[-1] > 1:
        values = ranking_distillation_loss(student_logits, teacher_logits, k=k, margin=margin)
        return _pixel_mean(values, pixels)
    if k != 1:
        raise ValueError(f"k must be 1 for one foreground class, got {k}")
    s, t = student_logits[..., 0], teacher_logits[..., 0]
    return _pixel_mean(jax.nn.relu(margin - jnp.where(t > 0, s, -s)), pixels)


def class_logits(logits: jax.Array) -> jax.Array:
    """Returns one logit per class: ``[..., 1]`` becomes ``[0, s]``; wider logits are unchanged."""
    if logits.shape[-1] > 1:
        return logits
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def _soft_dice(probs: jax.Array, truth: jax.Array, pixels: jax.Array) -> jax.Array:
    """Returns ``1 - (2 sum p y + 1) / (sum p + sum y + 1)``, ``[B]``; 0 without valid pixels."""
    axes = tuple(range(1, probs.ndim))
    valid = pixels.astype(probs.dtype)
    both = jnp.sum(probs * truth * valid, axis=axes)
    either = jnp.sum((probs + truth) * valid, axis=axes)
    return 1 - (2 * both + _SMOOTH) / (either + _SMOOTH)


def _pixel_mean(values: jax.Array, pixels: jax.Array) -> jax.Array:
    axes = tuple(range(1, values.ndim))
    count = jnp.maximum(jnp.sum(pixels, axis=axes, keepdims=True), 1).astype(values.dtype)
    # Divided before summing, because the sum of huge values would overflow and their mean does not.
    return jnp.sum(jnp.where(pixels, values / count, 0), axis=axes)


def _hidden(logits: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns logits with masked pixels zeroed, so that no NaN poisons a gradient, and the mask."""
    logits = at_least_float32(logits)
    shape = logits.shape[:-1]
    if where is None:
        return logits, jnp.ones(shape, bool)
    if where.shape == shape[:1]:
        where = jnp.broadcast_to(where.reshape(-1, *(1,) * (len(shape) - 1)), shape)
    check_shape("where", where, shape)
    return jnp.where(where[..., None], logits, 0), where
