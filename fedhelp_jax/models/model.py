"""Defines ``Model``, the interface through which algorithms use a network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from fedhelp_jax.typing import PyTree

Variables = dict[str, PyTree]


class Model(NamedTuple):
    """A network as three pure functions over a plain dict of variables.

    ``variables = {"params": {"features": ..., "head": ...}, "batch_stats": ...}``; ``batch_stats``
    may be empty. To use any other library, write the three functions.

    Attributes:
      init: ``(key, sample_shape) -> variables``, with ``sample_shape`` ``(*spatial, channels)``.
      features: ``(variables, x, *, train, mask) -> (features, batch_stats)``. ``x`` is float
        ``[B, *spatial, channels]``; ``variables`` need not hold a head. With ``train``, a batch is
        normalised by its own statistics, over the examples where ``mask`` (``[B]`` boolean or None)
        is true, and the updated running statistics are returned. Otherwise it is normalised by the
        running statistics, which are returned unchanged.
      head: ``(head_params, features) -> logits``.
    """

    init: Callable[..., Variables]
    features: Callable[..., tuple[jax.Array, Variables]]
    head: Callable[..., jax.Array]


def apply_model(
    model: Model,
    variables: Variables,
    x: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Variables]:
    """Returns the logits of a whole network, and its batch statistics after the call.

    Args:
      model: The network.
      variables: The variables of the network, including the head.
      x: ``[B, *spatial, channels]`` float images.
      train: Whether to normalise by the batch and update the running statistics.
      mask: ``[B]`` boolean, the real examples of a padded batch, or None.

    Returns:
      ``(logits [B, ...], batch_stats)``.
    """
    features, batch_stats = model.features(variables, x, train=train, mask=mask)
    return model.head(variables["params"]["head"], features), batch_stats


def with_compute_dtype(model: Model, dtype: DTypeLike) -> Model:
    """Makes a network use activations of another dtype; variables, features and logits keep theirs.

    Images are cast at the input and features at the output. Convolutions multiply in the
    activations' dtype, on CPUs in float32 or wider, and sum in float32 or wider. Normalisation
    computes in the dtype of its parameters. Neither the parameters' gradients nor batch statistics
    are rounded to ``dtype``.

    Args:
      model: A network of the layers in ``fedhelp_jax.models``; other layers must also follow
        ``x.dtype``.
      dtype: The dtype of the activations, such as ``jnp.bfloat16``.

    Returns:
      The same network, whose ``features`` have the dtype of its images.
    """

    def features(
        variables: Variables, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        out, stats = model.features(variables, x.astype(dtype), train=train, mask=mask)
        return out.astype(x.dtype), stats

    return model._replace(features=features)


def with_precision(model: Model, precision: str) -> Model:
    """Makes a network multiply float32 numbers with a given precision, in its gradients too.

    It matters on accelerators only; CPUs always multiply in float32.

    ===========  ==============================  =====================
    precision    NVIDIA GPUs since Ampere        TPUs
    ===========  ==============================  =====================
    "default"    TF32 (10 bits of mantissa)      bfloat16 (7 bits)
    "high"       TF32                            three bfloat16 passes
    "highest"    float32 (23 bits)               six bfloat16 passes
    ===========  ==============================  =====================

    Sums are in float32 in any case (see ``jax.lax.Precision``).

    Args:
      model: The network, of any library whose layers follow ``jax.default_matmul_precision``.
      precision: "default", "high" or "highest".

    Returns:
      The same network, with that precision in ``features`` and ``head``.
    """

    def features(*args: Any, **kwargs: Any) -> tuple[jax.Array, Variables]:
        with jax.default_matmul_precision(precision):
            return model.features(*args, **kwargs)

    def head(*args: Any) -> jax.Array:
        with jax.default_matmul_precision(precision):
            return model.head(*args)

    return model._replace(features=features, head=head)


def multiplied_in(compute_dtype: str, precision: str, platform: str) -> str:
    """Returns what products of a network are computed in, for people to read.

    Example:
        >>> multiplied_in("float32", "default", "gpu")
        'TF32 where the GPU has it'
    """
    if platform == "cpu":
        return "float32"
    if compute_dtype != "float32":
        return compute_dtype
    if platform == "tpu":
        passes = {"default": "", "high": ", three passes", "highest": ", six passes"}
        return f"bfloat16{passes[precision]}"
    return "float32" if precision == "highest" else "TF32 where the GPU has it"
