"""Provides the losses of FedHelp: per example, unreduced and maskable.

This package needs JAX and no other part of fedhelp_jax, so that other research can use it with
``from fedhelp_jax import losses``. Every function

* takes logits as ``[*B, C]``, with any leading axes, such as those of a segmentation map,
* returns one value per leading index, ``[*B]``, in nats,
* takes ``where``, a boolean ``[*B]``: masked entries are exactly 0, and so are their gradients,
* computes in float32 for half-precision inputs and keeps float64,
* works under ``jit``, ``vmap`` and ``grad`` and stays finite on extreme finite logits.

The reference for all of them is FedHelp, arXiv:2412.19654, sec. 3.3 and 3.4.
"""

from fedhelp_jax.losses.classification import (
    DualDistillation,
    asymmetric_dual_distillation,
    auxiliary_loss,
    cross_entropy_loss,
    distillation_loss,
    ranking_distillation_loss,
    set_ranking_loss,
)
from fedhelp_jax.losses.common import (
    at_least_float32,
    check_shape,
    check_temperature,
    masked_mean,
)
from fedhelp_jax.losses.segmentation import (
    class_logits,
    mask_distillation_loss,
    mask_loss,
    mask_ranking_loss,
)

__all__ = [
    "DualDistillation",
    "asymmetric_dual_distillation",
    "at_least_float32",
    "auxiliary_loss",
    "check_shape",
    "check_temperature",
    "class_logits",
    "cross_entropy_loss",
    "distillation_loss",
    "mask_distillation_loss",
    "mask_loss",
    "mask_ranking_loss",
    "masked_mean",
    "ranking_distillation_loss",
    "set_ranking_loss",
]
