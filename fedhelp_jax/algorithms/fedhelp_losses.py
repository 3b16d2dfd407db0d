"""Defines FedHelp's settings, and the distillation losses that they control.

The method itself is in ``fedhelp``. The deviations of the released code (docs/method.md, sec. 11)
are kept here, so that the method's steps read as in the paper.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import Setup
from fedhelp_jax.algorithms.class_priors import LOCAL_PRIORS
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.losses.reference_code import (
    released_distillation_loss,
    released_ranking_loss,
    released_stored_logits_loss,
)
from fedhelp_jax.settings import (
    COUNT,
    Check,
    at_least,
    more_than,
    one_of,
    setting,
    unless,
    where,
    whole,
)

# Oddities of the released code, by their names in the setting `released_code`.
RELEASED_CODE = (
    "inverted_ranking",
    "no_large_gradient",
    "undetached_teacher",
    "mean_kl",
    "raw_answers",
    "fresh_heads",
)
_RELEASED = Check(
    lambda names: set(names) <= {"all", *RELEASED_CODE},
    f"a tuple of some of all, {', '.join(RELEASED_CODE)}",
)


@dataclasses.dataclass(frozen=True)
class FedHelpSettings:
    """Settings of FedHelp; the paper's symbols in brackets."""

    temperature: float = setting(1.0, "softens both distillations (T)", more_than(0))
    lambda_fm: float = setting(
        1.0,
        "weight of the foundation model's answers; 0 turns them off",
        at_least(0),
        only=(unless("public.name", "none"), unless("teacher.name", "none")),
    )
    lambda_f: float = setting(
        1.0, "weight of the forward distillation, large model to proxy; 0 turns it off", at_least(0)
    )
    lambda_b: float = setting(
        0.2, "weight of the backward ranking, proxy to large model; 0 turns it off", at_least(0)
    )
    k: int | None = setting(
        None,
        "classes above the line in the ranking; None takes 5 of 8 classes, 1 of 2, and that share "
        "elsewhere",
        COUNT,
        only=where("algorithm.settings.backward", "ranking"),
    )
    margin: float = setting(
        0.0,
        "margin of the ranking, in logits",
        at_least(0),
        only=where("algorithm.settings.backward", "ranking"),
    )
    kd_warmup_rounds: int = setting(1, "rounds at the start with lambda_f = lambda_b = 0", whole(0))
    public_batch_stats: str = setting(
        "discard",
        '"discard" or "shared", see docs/method.md',
        one_of("discard", "shared"),
        only=unless("public.name", "none"),
    )
    joint: bool = setting(
        False,
        "small clients take one step on the sum of both losses instead of two",
        only=unless("public.name", "none"),
    )
    public_labels: bool = setting(
        True,
        "small clients learn the public labels, where known; without, the answers only",
        only=unless("public.name", "none"),
    )
    backward: str = setting(
        "ranking",
        '"ranking", or "kl": the proxy teaches the large model in full too (symmetric)',
        one_of("ranking", "kl"),
    )
    local_priors: bool = setting(False, LOCAL_PRIORS)
    released_code: tuple[str, ...] = setting(
        (),
        'oddities of the released code to reproduce, or ("all",); what each does stands in '
        "docs/method.md, section 11",
        _RELEASED,
    )


def with_released_code(setup: Setup, settings: FedHelpSettings) -> FedHelpSettings:
    """Expands "all" in the settings: every oddity, and the other settings of the released code.

    Raises:
      UserError: If the task is not classification, because other released code does not run.
    """
    if settings.released_code and setup.task.name != "classification":
        raise UserError(f"algorithm.released_code: there is none of {setup.task.name} that runs")
    if "all" not in settings.released_code:
        return settings
    return dataclasses.replace(
        settings,
        released_code=RELEASED_CODE,
        public_labels=False,
        public_batch_stats="shared",
        kd_warmup_rounds=0,
    )


def answers_loss(
    setup: Setup, settings: FedHelpSettings, logits: jax.Array, answers: jax.Array
) -> jax.Array:
    """Returns a small client's loss on the foundation model's answers, ``[B]``."""
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
    """Returns the loss of distilling all of a teacher's logits, ``[B]``."""
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
    """Returns the large model's weighted loss on what the proxy teaches it, ``[B]``."""
    k = settings.k if settings.k is not None else setup.task.default_k(setup.num_classes)
    if settings.backward == "kl":
        loss = forward_loss(setup, settings, logits, proxy_logits, taught)
    elif "inverted_ranking" in settings.released_code:
        # Turned into the sum over the batch, because the caller takes the mean.
        loss = released_ranking_loss(logits, proxy_logits, k=k, where=taught) * jnp.sum(taught)
    else:
        loss = setup.task.rank(logits, proxy_logits, k=k, margin=settings.margin, where=taught)
    loss *= settings.lambda_b
    if "undetached_teacher" in settings.released_code:
        # The forward distillation, but with a gradient for the teacher.
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
