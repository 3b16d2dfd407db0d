"""``Task``: all that tells one kind of prediction from another; nothing else asks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedhelp_jax import losses, metrics
from fedhelp_jax.models import resnet


class Task(NamedTuple):
    """Losses, heads and metrics of a kind of prediction.

    Attributes:
      name: "classification".
      headline: Name of the metric that tables lead with.
      loss: ``(logits, targets, *, where) -> [B]``.
      distill: ``(student_logits, teacher_logits, *, temperature, where) -> [B]``.
      rank: ``(student_logits, teacher_logits, *, k, margin, where) -> [B]``.
      init_head: ``(key, feature_width, num_classes) -> head_params`` of an extra head on the
        features.
      head: ``(head_params, features) -> logits``.
      metrics: ``(logits [n, ...], targets [n, ...], mask [n]) -> {name: scalar}``.
      default_k: ``num_classes -> k`` of the ranking.
    """

    name: str
    headline: str
    loss: Callable[..., jax.Array]
    distill: Callable[..., jax.Array]
    rank: Callable[..., jax.Array]
    init_head: Callable[..., Any]
    head: Callable[..., jax.Array]
    metrics: Callable[..., dict[str, jax.Array]]
    default_k: Callable[[int], int]


classification = Task(
    name="classification",
    headline="balanced_accuracy",
    loss=losses.cross_entropy_loss,
    distill=losses.distillation_loss,
    rank=losses.ranking_distillation_loss,
    init_head=resnet.init_linear,
    head=resnet.linear,
    metrics=metrics.classification_metrics,
    # 5 of 8 classes and 1 of 2, as the authors use; the same share elsewhere.
    default_k=lambda num_classes: max(1, 5 * num_classes // 8),
)
