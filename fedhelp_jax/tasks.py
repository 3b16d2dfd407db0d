"""Defines ``Task``: everything that depends on the kind of prediction."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax import losses, metrics
from fedhelp_jax.losses import segmentation as mask_losses
from fedhelp_jax.models import layers


class Task(NamedTuple):
    """The losses, heads and metrics of a kind of prediction.

    Attributes:
      name: "classification" or "segmentation".
      headline: Name of the main metric, which comes first in tables.
      loss: ``(logits, targets, *, where) -> [B]``.
      distill: ``(student_logits, teacher_logits, *, temperature, where) -> [B]``.
      rank: ``(student_logits, teacher_logits, *, k, margin, where) -> [B]``.
      init_head: ``(key, feature_width, num_classes) -> head_params`` of an extra head on the
        features.
      head: ``(head_params, features) -> logits``.
      metrics: ``(logits [n, ...], targets [n, ...], mask [n]) -> {name: scalar}``.
      num_ranked: ``num_classes ->`` number of classes in the ranking.
      default_k: ``num_classes -> k`` of the ranking.
      memberships: ``(targets [B, ...], spatial, num_ranked) -> [B, *spatial, num_ranked]``: the
        share of each class in each position of a feature map; the shares sum to 1.
      class_logits: ``logits [..., F] -> [..., num_ranked]``, one logit per class.
      predict: ``(logits [n, ...], targets [n, ...]) ->`` predictions of the targets' shape; None if
        the metrics say everything and no predictions are needed.
      keeps_logits: Whether a run saves the logits of every example of its final evaluation.
    """

    name: str
    headline: str
    loss: Callable[..., jax.Array]
    distill: Callable[..., jax.Array]
    rank: Callable[..., jax.Array]
    init_head: Callable[..., Any]
    head: Callable[..., jax.Array]
    metrics: Callable[..., dict[str, jax.Array]]
    num_ranked: Callable[[int], int]
    default_k: Callable[[int], int]
    memberships: Callable[..., jax.Array]
    class_logits: Callable[[jax.Array], jax.Array]
    predict: Callable[..., jax.Array] | None = None
    keeps_logits: bool = False


classification = Task(
    name="classification",
    headline="balanced_accuracy",
    loss=losses.cross_entropy_loss,
    distill=losses.distillation_loss,
    rank=losses.ranking_distillation_loss,
    init_head=layers.init_linear,
    head=layers.linear,
    metrics=metrics.classification_metrics,
    num_ranked=lambda num_classes: num_classes,
    # 5 of 8 classes and 1 of 2, as the authors use, and the same share for other numbers.
    default_k=lambda num_classes: max(1, 5 * num_classes // 8),
    memberships=lambda targets, spatial, num_ranked: jax.nn.one_hot(targets, num_ranked),
    class_logits=lambda logits: logits,
    keeps_logits=True,
)


def segmentation(label_names: Sequence[str]) -> Task:
    """Returns the task of predicting the class of every pixel or voxel.

    Masks have a resolution of their own. Loss and metrics are computed there, on logits resized
    linearly. (Resizing masks to the logits' size by nearest neighbour shifts them by half a pixel
    when it halves them, and networks learn the shift.) A foundation model's mask logits are resized
    linearly to the student's size.

    Args:
      label_names: One name for one foreground class; else all classes, the background first.

    Returns:
      The task, with the losses of :mod:`fedhelp_jax.losses.segmentation`.
    """

    def loss(logits: jax.Array, targets: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
        logits = _resized(logits, (*targets.shape, logits.shape[-1]))
        return mask_losses.mask_loss(logits, targets, where=where)

    def distill(
        student_logits: jax.Array,
        teacher_logits: jax.Array,
        *,
        temperature: float | jax.Array = 1.0,
        where: jax.Array | None = None,
    ) -> jax.Array:
        shape = (*student_logits.shape[:-1], teacher_logits.shape[-1])
        teacher_logits = _resized(teacher_logits, shape)
        return mask_losses.mask_distillation_loss(
            student_logits, teacher_logits, temperature=temperature, where=where
        )

    def memberships(targets: jax.Array, spatial: tuple[int, ...], num_ranked: int) -> jax.Array:
        return _resized(jax.nn.one_hot(targets, num_ranked), (len(targets), *spatial, num_ranked))

    def predict(logits: jax.Array, targets: jax.Array) -> jax.Array:
        one = functools.partial(metrics.predict_masks, shape=targets.shape[1:])
        return jax.lax.map(one, logits).astype(jnp.uint8)

    return Task(
        name="segmentation",
        headline="dice",
        loss=loss,
        distill=distill,
        rank=mask_losses.mask_ranking_loss,
        init_head=layers.init_linear,
        head=layers.linear,
        metrics=functools.partial(metrics.segmentation_metrics, label_names=tuple(label_names)),
        num_ranked=lambda num_classes: max(2, num_classes),
        default_k=lambda num_classes: 1,
        memberships=memberships,
        class_logits=mask_losses.class_logits,
        predict=predict,
    )


def _resized(logits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Resizes maps ``[B, ...]`` linearly to ``shape``, which must have as many examples."""
    logits = losses.at_least_float32(logits)
    losses.check_shape("examples", logits, (shape[0], *logits.shape[1:]))
    return logits if logits.shape == shape else jax.image.resize(logits, shape, "linear")
