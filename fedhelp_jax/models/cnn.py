"""Provides two-layer convolutional networks, for sweeps over methods or clients and for trials."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedhelp_jax.models.layers import BatchNorm, Conv, linen_model
from fedhelp_jax.models.model import Model

# Channels of the two layers. The features have equal widths, for methods that exchange them.
CNNS = {"cnn_small": (8, 32), "cnn_large": (32, 32)}


class CNNFeatures(nn.Module):
    """Maps ``[B, *spatial, C]`` to ``[B, widths[-1]]``: all layers up to the global average."""

    widths: tuple[int, ...]
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Applies the layer."""
        x = jnp.moveaxis(x, -1, 0)
        for i, width in enumerate(self.widths, start=1):
            x = Conv(width, stride=2, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(name=f"bn{i}")(x, train=self.train, mask=mask))
        return jnp.mean(x, axis=tuple(range(2, x.ndim)), dtype=float).T


def cnn(widths: tuple[int, ...], num_classes: int) -> Model:
    """Returns a network of 3-wide convolutions of stride 2 and a global average.

    Each convolution is followed by batch normalisation and a ReLU.

    Args:
      widths: Channels of each convolution; ``CNNS`` names some choices.
      num_classes: Width ``C`` of the head.

    Returns:
      A :class:`Model` of images ``[B, *spatial, channels]`` of any size; ``features`` returns ``[B,
      widths[-1]]`` and ``head`` ``[B, C]``.
    """
    return linen_model(lambda train: CNNFeatures(widths, train), widths[-1], num_classes)
