"""Metrics of one client's whole split, as scikit-learn defines them; NaN where undefined."""

import jax
import jax.numpy as jnp

_ECE_BINS = 15


def classification_metrics(
    logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Classification metrics over the examples where ``mask`` is true.

    Args:
      logits: ``[n, C]`` unnormalised logits.
      labels: ``[n]`` integers in ``[0, C)``.
      mask: ``[n]`` boolean; padding is False.

    Returns:
      Scalars in ``[0, 1]``, except ``loss`` in nats; all NaN if nothing is valid:

      * ``balanced_accuracy``: mean recall over the classes present in ``labels``.
      * ``accuracy``.
      * ``macro_f1``: mean over the classes present in ``labels`` or among the predictions.
      * ``auroc``: one against the rest, ties counted half, mean over the classes that have both
        positives and negatives; NaN if there is none.
      * ``ece``: expected calibration error of the largest probability, 15 equal-width bins.
      * ``loss``: mean cross-entropy.
    """
    num_classes = logits.shape[-1]
    log_probs = jax.nn.log_softmax(jnp.where(mask[:, None], logits, 0).astype(jnp.float32))
    probs = jnp.exp(log_probs)
    predicted = jnp.argmax(logits, axis=-1)
    count = jnp.sum(mask)
    confusion = jnp.zeros((num_classes, num_classes)).at[labels, predicted].add(mask)
    hits, true, called = jnp.diagonal(confusion), confusion.sum(1), confusion.sum(0)
    log_likelihood = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    return {
        "balanced_accuracy": _mean(_ratio(hits, true), true > 0),
        "accuracy": _ratio(hits.sum(), count),
        "macro_f1": _mean(_ratio(2 * hits, true + called), true + called > 0),
        "auroc": _auroc(probs, labels, mask),
        "ece": _ece(probs, predicted == labels, mask),
        "loss": -_mean(log_likelihood, mask),
    }


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return jnp.where(denominator > 0, numerator / jnp.maximum(denominator, 1), jnp.nan)


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return _ratio(jnp.sum(jnp.where(where, values, 0)), jnp.sum(where))


def _auroc(probs: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    def one_class(scores: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        positive, negative = mask & (labels == index), mask & (labels != index)
        # Negatives only, the rest behind them: a positive wins over those below it, half over
        # equals.
        ordered = jnp.sort(jnp.where(negative, scores, jnp.inf))
        below = jnp.searchsorted(ordered, scores, side="left")
        not_above = jnp.searchsorted(ordered, scores, side="right")
        wins = _mean((below + not_above) / 2, positive)
        return _ratio(wins, jnp.sum(negative)), positive.any() & negative.any()

    areas, defined = jax.vmap(one_class)(probs.T, jnp.arange(probs.shape[-1]))
    return _mean(areas, defined)


def _ece(probs: jax.Array, correct: jax.Array, mask: jax.Array) -> jax.Array:
    confidence = probs.max(axis=-1)
    # Bins are open on the left: a confidence of exactly i/15 belongs to the bin that ends there.
    bins = jnp.clip(jnp.ceil(confidence * _ECE_BINS).astype(jnp.int32) - 1, 0, _ECE_BINS - 1)
    gaps = jnp.zeros(_ECE_BINS).at[bins].add(jnp.where(mask, correct - confidence, 0))
    return _ratio(jnp.abs(gaps).sum(), jnp.sum(mask))
