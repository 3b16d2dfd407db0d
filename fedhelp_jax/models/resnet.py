"""Provides CIFAR-style residual networks: ResNet-20, 32, 44, 56, 110."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedhelp_jax.models.layers import BatchNorm, Conv, linen_model
from fedhelp_jax.models.model import Model

RESNET_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut: subsampled, padded with zero channels."""

    features: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        """Applies the layer."""
        y = Conv(self.features, stride=self.stride, name="conv1")(x)
        y = nn.relu(BatchNorm(name="bn1")(y, train=self.train, mask=mask))
        y = Conv(self.features, name="conv2")(y)
        y = BatchNorm(name="bn2")(y, train=self.train, mask=mask)
        more = self.features - x.shape[0]
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = jnp.pad(shortcut, ((more // 2, more - more // 2), (0, 0), (0, 0), (0, 0)))
        # nn.scan requires a pair from its body: the carry, and here nothing to stack.
        return nn.relu(y + shortcut), None


class Stage(nn.Module):
    """A first block that may change the shape, then identical blocks, scanned to compile once."""

    features: int
    stride: int
    blocks: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Applies the layer."""
        x, _ = Block(self.features, self.stride, self.train, name="first")(x, mask)
        if self.blocks > 1:
            scanned = nn.scan(
                Block,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                in_axes=cast(int, nn.broadcast),  # flax's annotation omits its constant
                length=self.blocks - 1,
            )
            x, _ = scanned(self.features, 1, self.train, name="rest")(x, mask)
        return x


class ResNetFeatures(nn.Module):
    """Maps ``[B, H, W, C]`` to ``[B, 64]``: a CIFAR ResNet up to the global average."""

    blocks: int
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Applies the layer."""
        x = jnp.transpose(x, (3, 0, 1, 2))
        x = Stem(self.train, name="stem")(x, mask)
        for i, width in enumerate(_WIDTHS):
            stage = Stage(width, 1 if i == 0 else 2, self.blocks, self.train, name=f"stage{i + 1}")
            x = stage(x, mask)
        return jnp.mean(x, axis=(2, 3), dtype=float).T


class Stem(nn.Module):
    """The first convolution, with its normalisation and a ReLU."""

    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Applies the layer."""
        x = Conv(_WIDTHS[0], name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x, train=self.train, mask=mask))


def resnet(depth: int, num_classes: int) -> Model:
    """Returns a CIFAR ResNet of ``depth = 6 n + 2`` layers (He et al., arXiv:1512.03385, sec. 4.2).

    It has option-A shortcuts, He initialisation and PyTorch's batch normalisation. The variables of
    all blocks of a stage but the first are stacked on a leading axis
    (``params["features"]["stage1"]["rest"]``).

    Args:
      depth: 20, 32, 44, 56, 110 or any other ``6 n + 2``.
      num_classes: Width ``C`` of the head.

    Returns:
      A :class:`Model`; ``features`` returns ``[B, 64]`` and ``head`` ``[B, C]``.

    Raises:
      ValueError: If ``depth`` is not ``6 n + 2``.
    """
    blocks, remainder = divmod(depth - 2, 6)
    if remainder or blocks < 1:
        raise ValueError(f"a CIFAR ResNet has 6 n + 2 layers, got depth {depth}")

    return linen_model(lambda train: ResNetFeatures(blocks, train), _WIDTHS[-1], num_classes)
