"""Computes the overlap of masks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fedhelp_jax.losses import at_least_float32
from fedhelp_jax.metrics.common import finite_examples, mean, ratio

# The class of every pixel of a map whose logits are not all finite; it fits in uint8.
NO_CLASS = 255


def segmentation_metrics(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, *, label_names: Sequence[str]
) -> dict[str, jax.Array]:
    """Returns the overlap of predicted and true masks, at the true masks' own resolution.

    Logits are resized to it linearly. A pixel then belongs to the class with the largest logit, or
    with one foreground class, to that class if its logit is positive. For an example and a class,
    with P predicted and T true pixels, ``dice = 2 |P and T| / (|P| + |T|)`` and
    ``iou = |P and T| / |P or T|``. A class that is in neither mask of an example has no value, and
    an example without foreground has none at all. A map with a logit that is not finite scores 0
    for every class, so that it never counts as correctly found background.

    Args:
      logits: ``[n, *spatial, C]`` unnormalised logits.
      targets: ``[n, *own]`` integer classes.
      mask: ``[n]`` boolean; padding is False.
      label_names: ``[C]`` names; with ``C >= 2`` the first is the background.

    Returns:
      Scalars in ``[0, 1]``, means over examples; NaN if nothing is valid:

      * ``dice`` (headline) and ``iou``: the mean over an example's foreground classes.
      * With two or more foreground classes, also ``dice_<name>`` and ``iou_<name>`` of each, and
        ``dice_foreground`` and ``iou_foreground`` of all of them merged into one.
    """
    classes = max(2, logits.shape[-1])

    def count(example: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Counts the pixels of each pair of true and predicted class, ``[classes, classes]``."""
        logits, truth = example
        predicted = predict_masks(logits, truth.shape)
        pairs = truth.astype(jnp.int32) * classes + predicted
        return jnp.sum(
            pairs.reshape(-1, 1) == jnp.arange(classes**2), axis=0, dtype=jnp.int32
        ).reshape(classes, classes)

    # One example after the other: a whole split at its own resolution may need much memory.
    pairs = lax.map(count, (logits, targets)).astype(jnp.float32)
    # One column per foreground class; the last one merges them all.
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
        ("dice", ratio(2 * both, true + called)),
        ("iou", ratio(both, true + called - both)),
    ):
        values = jnp.where(finite, values, 0)
        per_example = jax.vmap(mean)(values[:, :-1], present[:, :-1])
        results[name] = mean(per_example, present[:, :-1].any(1))
        if classes > 2:
            names = [*label_names[1:], "foreground"]
            for i, label in enumerate(names):
                results[f"{name}_{label}"] = mean(values[:, i], present[:, i])
    return results


def predict_masks(logits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the class of each pixel of one map, int32 ``shape``, from logits ``[*spatial, C]``.

    The class is `NO_CLASS` everywhere if any logit is not finite.
    """
    logits = at_least_float32(logits)
    finite = jnp.isfinite(logits).all()
    logits = jax.image.resize(logits, (*shape, logits.shape[-1]), "linear")
    if logits.shape[-1] == 1:
        classes = (logits[..., 0] > 0).astype(jnp.int32)
    else:
        classes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(finite, classes, NO_CLASS)
