"""Computes metrics of classification."""

import jax
import jax.numpy as jnp
from jax import lax

from fedhelp_jax.metrics.common import finite_examples, mean, ratio

_ECE_BINS = 15


def classification_metrics(
    logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Returns classification metrics over the examples where ``mask`` is true.

    Args:
      logits: ``[n, C]`` unnormalised logits.
      labels: ``[n]`` integers in ``[0, C)``.
      mask: ``[n]`` boolean; padding is False.

    Returns:
      Scalars in ``[0, 1]``, except ``loss`` in nats; all NaN if nothing is valid:

      * ``balanced_accuracy``: mean recall over the classes present in ``labels``.
      * ``accuracy``.
      * ``macro_f1``: mean over the classes present in ``labels`` or among the predictions.
      * ``auroc``: one class against the rest, scored by the log-odds of the class, ``s_c - log
        sum_{j != c} exp s_j``. Unlike probabilities, these still differ where the network is sure.
        Ties count half. It is the mean over the classes that have both positives and negatives, and
        NaN if there are none.
      * ``ece``: expected calibration error of the largest probability, 15 equal-width bins.
      * ``loss``: mean cross-entropy.

      A valid row with a logit that is not finite predicts no class: it lowers the recall of its own
      class, and the precision of none. ``auroc``, ``ece`` and ``loss`` are then NaN.
    """
    num_classes = logits.shape[-1]
    finite = finite_examples(logits)
    defined = jnp.all(finite | ~mask)
    usable = (mask & finite)[:, None]
    logits = jnp.where(usable, logits, 0).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)
    predicted = jnp.where(finite, jnp.argmax(logits, axis=-1), num_classes)
    count = jnp.sum(mask)
    # The last column counts the examples for which no class is predicted.
    confusion = jnp.zeros((num_classes, num_classes + 1)).at[labels, predicted].add(mask)
    hits, true, called = jnp.diagonal(confusion), confusion.sum(1), confusion.sum(0)[:-1]
    log_likelihood = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    of_scores = {
        "auroc": _auroc(logits, labels, mask),
        "ece": _ece(probs, predicted == labels, mask),
        "loss": -mean(log_likelihood, mask),
    }
    return {
        "balanced_accuracy": mean(ratio(hits, true), true > 0),
        "accuracy": ratio(hits.sum(), count),
        "macro_f1": mean(ratio(2 * hits, true + called), true + called > 0),
        **{name: jnp.where(defined, value, jnp.nan) for name, value in of_scores.items()},
    }


def _auroc(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the AUROC of finite logits; NaN if no class has both positives and negatives."""
    classes = jnp.arange(logits.shape[-1])

    def log_odds(index: jax.Array) -> jax.Array:
        others = jnp.where(classes == index, -jnp.inf, logits)
        return logits[:, index] - jax.nn.logsumexp(others, axis=-1)

    def one_class(scores: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        positive, negative = mask & (labels == index), mask & (labels != index)
        positives, negatives = jnp.sum(positive), jnp.sum(negative)
        # Negatives come first, the rest after them. A positive wins against the negatives below it,
        # and half against equal ones. Scores may be infinite, because finite logits may be too far
        # apart for a float.
        ordered = jnp.sort(jnp.where(negative, scores, jnp.inf))
        below = jnp.searchsorted(ordered, scores, side="left")
        not_above = jnp.minimum(jnp.searchsorted(ordered, scores, side="right"), negatives)
        # Divided only once, so that the classes of a binary problem have the same area.
        wins = jnp.sum(jnp.where(positive, (below + not_above) / 2, 0))
        area = ratio(wins, positives.astype(wins.dtype) * negatives)
        return area, positive.any() & negative.any()

    # One class after the other, because `others` for all classes at once would be [C, n, C].
    areas, defined = jax.vmap(one_class)(lax.map(log_odds, classes), classes)
    return mean(areas, defined)


def _ece(probs: jax.Array, correct: jax.Array, mask: jax.Array) -> jax.Array:
    confidence = probs.max(axis=-1)
    # Bins are open on the left: a confidence of exactly i/15 belongs to the bin ending there.
    bins = jnp.clip(jnp.ceil(confidence * _ECE_BINS).astype(jnp.int32) - 1, 0, _ECE_BINS - 1)
    gaps = jnp.zeros(_ECE_BINS).at[bins].add(jnp.where(mask, correct - confidence, 0))
    return ratio(jnp.abs(gaps).sum(), jnp.sum(mask))
