"""``Model``: all that an algorithm knows of a network."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.typing import DTypeLike

from fedhelp_jax.typing import PyTree

Variables = dict[str, PyTree]


class Model(NamedTuple):
    """A network as three pure functions over a plain dict of variables.

    ``variables = {"params": {"features": ..., "head": ...}, "batch_stats": ...}``; ``batch_stats``
    may be empty. PyTree library can stand behind it: write the three functions.

    Attributes:
      init: ``(key, sample_shape) -> variables``, ``sample_shape`` being ``(*spatial, channels)``.
      features: ``(variables, x, *, train, mask) -> (features, batch_stats)``. ``x`` is float
        ``[B, *spatial, channels]``; ``variables`` need hold no head. With ``train`` a batch is
        normalised by its own statistics, over the examples where ``mask`` (``[B]`` boolean or None)
        is true, and the updated running statistics come back; without, by the running ones, which
        come back unchanged.
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
    """Logits of a whole network and its batch statistics after the call.

    Args:
      model: The network.
      variables: Its variables, head included.
      x: ``[B, *spatial, channels]`` float images.
      train: Whether to normalise by the batch and update the running statistics.
      mask: ``[B]`` boolean, the real examples of a padded batch, or None.

    Returns:
      ``(logits [B, ...], batch_stats)``.
    """
    features, batch_stats = model.features(variables, x, train=train, mask=mask)
    return model.head(variables["params"]["head"], features), batch_stats


def with_compute_dtype(model: Model, dtype: DTypeLike) -> Model:
    """The network on activations of another dtype; variables, features and logits keep theirs.

    Images are cast on their way in and features on their way out. Convolutions multiply in the
    activations' dtype and sum in float32 or wider; normalisation computes in the dtype of its
    parameters. No gradient of a parameter and no batch statistic is rounded to ``dtype``.

    Args:
      model: A network of the layers in ``fedhelp_jax.models``; others must follow ``x.dtype`` too.
      dtype: Of the activations, such as ``jnp.bfloat16``.

    Returns:
      The same network, its ``features`` of the dtype that its images have.
    """

    def features(
        variables: Variables, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        out, stats = model.features(variables, x.astype(dtype), train=train, mask=mask)
        return out.astype(x.dtype), stats

    return model._replace(features=features)
