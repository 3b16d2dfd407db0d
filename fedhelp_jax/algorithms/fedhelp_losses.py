"""FedHelp's settings, and its distillations as these switch them.

The method itself is in ``fedhelp``. What the released code does otherwise (docs/method.md, sec. 11)
is kept here, so that the method's own steps read as the paper has them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import Setup
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.losses.reference_code import (
    released_distillation_loss,
    released_ranking_loss,
    released_stored_logits_loss,
)
from fedhelp_jax.settings.schema import RELEASED_CODE


class FedHelpSettings(NamedTuple):
    """Settings of FedHelp; the paper's symbols in brackets.

    Attributes:
      temperature: Softens both distillations (T).
      lambda_fm: Weight of the foundation model's answers; 0 turns them off.
      lambda_f: Weight of the forward distillation, large model to proxy; 0 turns it off.
      lambda_b: Weight of the backward ranking, proxy to large model; 0 turns it off.
      k: Classes above the line in the ranking; None takes 5 of 8 classes, 1 of 2, and that share
        elsewhere.
      margin: Margin of the ranking, in logits.
      kd_warmup_rounds: Rounds at the start with lambda_f = lambda_b = 0.
      public_batch_stats: "discard" or "shared", see the notes above.
      joint: Small clients take one step on the sum of both losses instead of two.
      public_labels: Small clients learn the public labels, where known; without, the answers only.
      backward: "ranking", or "kl": the proxy teaches the large model in full too (symmetric).
      released_code: Oddities of the released code to reproduce, or ("all",); their names and what
        they do stand in docs/method.md, section 11.
    """

    temperature: float = 1.0
    lambda_fm: float = 1.0
    lambda_f: float = 1.0
    lambda_b: float = 0.2
    k: int | None = None
    margin: float = 0.0
    kd_warmup_rounds: int = 1
    public_batch_stats: str = "discard"
    joint: bool = False
    public_labels: bool = True
    backward: str = "ranking"
    released_code: tuple[str, ...] = ()


def with_released_code(setup: Setup, settings: FedHelpSettings) -> FedHelpSettings:
    """The settings with "all" written out: every oddity, and those that are settings by themselves.

    Raises:
      UserError: For another task than classification, whose released code does not run.
    """
    if settings.released_code and setup.task.name != "classification":
        raise UserError(f"algorithm.released_code: there is none of {setup.task.name} that runs")
    if "all" not in settings.released_code:
        return settings
    return settings._replace(
        released_code=RELEASED_CODE,
        public_labels=False,
        public_batch_stats="shared",
        kd_warmup_rounds=0,
    )


def answers_loss(
    setup: Setup, settings: FedHelpSettings, logits: jax.Array, answers: jax.Array
) -> jax.Array:
    """What a small client learns from the foundation model's answers, ``[B]``."""
    if "raw_answers" not in settings.released_code:
        return forward_loss(setup, settings, logits, answers, None)
    classes = 1 if "mean_kl" in settings.released_code else logits.shape[-1]
    return classes * released_stored_logits_loss(logits, answers)


def forward_loss(
    setup: Setup,
    settings: FedHelpSettings,
    logits: jax.Array,
    teacher_logits: jax.Array,
    where: jax.Array | None,
) -> jax.Array:
    """A teacher's distillation in full, ``[B]``."""
    loss = setup.task.distill(logits, teacher_logits, temperature=settings.temperature, where=where)
    if "mean_kl" in settings.released_code:
        return loss / (settings.temperature**2 * logits.shape[-1])
    return loss


def backward_loss(
    setup: Setup,
    settings: FedHelpSettings,
    logits: jax.Array,
    proxy_logits: jax.Array,
    taught: jax.Array,
) -> jax.Array:
    """What the proxy teaches the large model, weighted, ``[B]``."""
    k = settings.k if settings.k is not None else setup.task.default_k(setup.num_classes)
    if settings.backward == "kl":
        loss = forward_loss(setup, settings, logits, proxy_logits, taught)
    elif "inverted_ranking" in settings.released_code:
        # The sum over the batch, of which the mean is taken.
        loss = released_ranking_loss(logits, proxy_logits, k=k, where=taught) * jnp.sum(taught)
    else:
        loss = setup.task.rank(logits, proxy_logits, k=k, margin=settings.margin, where=taught)
    loss *= settings.lambda_b
    if "undetached_teacher" in settings.released_code:
        # The forward distillation, now with a gradient for the side that teaches.
        taught_by = released_distillation_loss(
            jax.lax.stop_gradient(proxy_logits),
            logits,
            temperature=settings.temperature,
            where=taught,
        )
        if "mean_kl" not in settings.released_code:
            taught_by *= settings.temperature**2 * logits.shape[-1]
        loss += settings.lambda_f * taught_by
    return loss
