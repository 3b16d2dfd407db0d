"""Metrics of one client's whole split; NaN where undefined.

Those of classification are scikit-learn's where it has them. An example whose logits are not all
finite has no answer, which is a wrong one: metrics of answers (accuracy, recall, F1, Dice, IoU)
count it as such, and metrics of scores (AUROC, calibration, loss) are undefined beside it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fedhelp_jax.losses import at_least_float32

_ECE_BINS = 15

# The class of every pixel of a map whose logits are not all finite; uint8 can hold it.
NO_CLASS = 255


def finite_examples(logits: jax.Array) -> jax.Array:
    """Which examples have only finite logits, boolean ``[n]``, of logits ``[n, ..., C]``."""
    return jnp.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))


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
      * ``auroc``: one against the rest by the log-odds of the class, ``s_c - log sum_{j != c} exp
        s_j``, which unlike probabilities still differ where the network is sure; ties counted
        half, mean over the classes that have both positives and negatives; NaN if there is none.
      * ``ece``: expected calibration error of the largest probability, 15 equal-width bins.
      * ``loss``: mean cross-entropy.

      A valid row with a logit that is not finite is a prediction of no class: it lowers the recall
      of its own class, and the precision of none. ``auroc``, ``ece`` and ``loss`` are NaN then.
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
    # The last column is of those who predict no class.
    confusion = jnp.zeros((num_classes, num_classes + 1)).at[labels, predicted].add(mask)
    hits, true, called = jnp.diagonal(confusion), confusion.sum(1), confusion.sum(0)[:-1]
    log_likelihood = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    of_scores = {
        "auroc": _auroc(logits, labels, mask),
        "ece": _ece(probs, predicted == labels, mask),
        "loss": -_mean(log_likelihood, mask),
    }
    return {
        "balanced_accuracy": _mean(_ratio(hits, true), true > 0),
        "accuracy": _ratio(hits.sum(), count),
        "macro_f1": _mean(_ratio(2 * hits, true + called), true + called > 0),
        **{name: jnp.where(defined, value, jnp.nan) for name, value in of_scores.items()},
    }


def segmentation_metrics(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, *, label_names: Sequence[str]
) -> dict[str, jax.Array]:
    """Overlap of predicted and true masks, at the true masks' own resolution.

    Logits are resized to it linearly; then a pixel belongs to the largest class, or to the one
    foreground class where its logit is positive. Of an example and a class, with P predicted and
    T true pixels, ``dice = 2 |P and T| / (|P| + |T|)`` and ``iou = |P and T| / |P or T|``; a class
    that is in neither has no value there, and an example without any foreground none at all. A map
    with a logit that is not finite has the value 0 for every class, so that it never counts as
    background that was found.

    Args:
      logits: ``[n, *spatial, C]`` unnormalised logits.
      targets: ``[n, *own]`` integer classes.
      mask: ``[n]`` boolean; padding is False.
      label_names: ``[C]`` names; with ``C >= 2`` the first is the background.

    Returns:
      Scalars in ``[0, 1]``, means over examples; NaN if nothing is valid:

      * ``dice`` (headline) and ``iou``: the mean over an example's foreground classes.
      * with two or more foreground classes also ``dice_<name>`` and ``iou_<name>`` of each, and
        ``dice_foreground`` and ``iou_foreground``, all of them taken as one.
    """
    classes = max(2, logits.shape[-1])

    def count(example: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Pixels of each pair of true and predicted class, ``[classes, classes]``."""
        logits, truth = example
        predicted = predict_masks(logits, truth.shape)
        pairs = truth.astype(jnp.int32) * classes + predicted
        return jnp.sum(
            pairs.reshape(-1, 1) == jnp.arange(classes**2), axis=0, dtype=jnp.int32
        ).reshape(classes, classes)

    # One after the other: all of a split at their own resolution may be a lot of memory.
    pairs = lax.map(count, (logits, targets)).astype(jnp.float32)
    # A column per foreground class; the last one takes them all as one.
    both = jnp.diagonal(pairs, axis1=1, axis2=2)[:, 1:]
    true, called = pairs.sum(2)[:, 1:], pairs.sum(1)[:, 1:]
    whole = [x.sum(1, keepdims=True) for x in (pairs[:, 1:, 1:].sum(2), true, called)]
    both, true, called = (
        jnp.concatenate([x, w], axis=1) for x, w in zip((both, true, called), whole, strict=True)
    )
    finite = finite_examples(logits)[:, None]
    present = ((true + called > 0) | ~finite) & mask[:, None]
    results = {}
    for name, values in (
        ("dice", _ratio(2 * both, true + called)),
        ("iou", _ratio(both, true + called - both)),
    ):
        values = jnp.where(finite, values, 0)
        per_example = jax.vmap(_mean)(values[:, :-1], present[:, :-1])
        results[name] = _mean(per_example, present[:, :-1].any(1))
        if classes > 2:
            names = [*label_names[1:], "foreground"]
            for i, label in enumerate(names):
                results[f"{name}_{label}"] = _mean(values[:, i], present[:, i])
    return results


def predict_masks(logits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The class of each pixel of one map, int32 ``shape``, from logits ``[*spatial, C]``.

    It is `NO_CLASS` everywhere if any logit is not finite.
    """
    logits = at_least_float32(logits)
    finite = jnp.isfinite(logits).all()
    logits = jax.image.resize(logits, (*shape, logits.shape[-1]), "linear")
    if logits.shape[-1] == 1:
        classes = (logits[..., 0] > 0).astype(jnp.int32)
    else:
        classes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(finite, classes, NO_CLASS)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return jnp.where(denominator > 0, numerator / jnp.maximum(denominator, 1), jnp.nan)


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return _ratio(jnp.sum(jnp.where(where, values, 0)), jnp.sum(where))


def _auroc(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Of finite logits; in ``[0, 1]``, NaN where no class has both positives and negatives."""
    classes = jnp.arange(logits.shape[-1])

    def log_odds(index: jax.Array) -> jax.Array:
        others = jnp.where(classes == index, -jnp.inf, logits)
        return logits[:, index] - jax.nn.logsumexp(others, axis=-1)

    def one_class(scores: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        positive, negative = mask & (labels == index), mask & (labels != index)
        positives, negatives = jnp.sum(positive), jnp.sum(negative)
        # Negatives only, the rest behind them: a positive wins over those below it, half over
        # equals. Scores may be infinite, as finite logits may be too far apart for a float.
        ordered = jnp.sort(jnp.where(negative, scores, jnp.inf))
        below = jnp.searchsorted(ordered, scores, side="left")
        not_above = jnp.minimum(jnp.searchsorted(ordered, scores, side="right"), negatives)
        # Divided once, so that both classes of two have the same area.
        wins = jnp.sum(jnp.where(positive, (below + not_above) / 2, 0))
        area = _ratio(wins, positives.astype(wins.dtype) * negatives)
        return area, positive.any() & negative.any()

    # One class after the other: the others of all classes at once would be [C, n, C].
    areas, defined = jax.vmap(one_class)(lax.map(log_odds, classes), classes)
    return _mean(areas, defined)


def _ece(probs: jax.Array, correct: jax.Array, mask: jax.Array) -> jax.Array:
    confidence = probs.max(axis=-1)
    # Bins are open on the left: a confidence of exactly i/15 belongs to the bin that ends there.
    bins = jnp.clip(jnp.ceil(confidence * _ECE_BINS).astype(jnp.int32) - 1, 0, _ECE_BINS - 1)
    gaps = jnp.zeros(_ECE_BINS).at[bins].add(jnp.where(mask, correct - confidence, 0))
    return _ratio(jnp.abs(gaps).sum(), jnp.sum(mask))
