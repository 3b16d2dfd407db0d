"""Provides CIFAR-style residual networks: ResNet-20, 32, 44, 56, 110."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedhelp_jax.models import conv_tpu
from fedhelp_jax.models.conv import conv
from fedhelp_jax.models.layers import BatchNorm, Conv, ConvKernel, FoldedBatchNorm, linen_model
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
        # nn.scan requires a pair from its body: the carry, and here nothing to stack.
        return nn.relu(y + _shortcut(x, self.features, self.stride)), None


class FusedBlock(nn.Module):
    """A `Block` in training, by the kernel for TPUs.

    Its input, ``[C, B, H, W]`` or ``[C, B * H * W]``, must not be negative, like the output of a
    ReLU, since the kernel applies one. Its output is ``[features, B * height * width]``.
    """

    features: int
    stride: int
    sides: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """Applies the layer."""
        kernel = ConvKernel(self.features, name="conv1")(x.shape[0])
        if self.stride == 1:
            shortcut = x.reshape(self.features, -1)
            nothing = jnp.ones(self.features), jnp.zeros(self.features)
            y, statistics = conv_tpu.conv_after(shortcut, *nothing, kernel, mask, self.sides)
        else:
            shortcut = _shortcut(x, self.features, self.stride).reshape(self.features, -1)
            y = conv(x, kernel, self.stride).reshape(self.features, -1)
            statistics = conv_tpu.statistics_of(y, mask)
        gain, shift = FoldedBatchNorm(name="bn1")(*statistics)
        kernel = ConvKernel(self.features, name="conv2")(self.features)
        y, statistics = conv_tpu.conv_after(y, gain, shift, kernel, mask, self.sides)
        gain, shift = FoldedBatchNorm(name="bn2")(*statistics)
        out = nn.relu(gain[:, None] * y + shift[:, None] + shortcut)
        return out.astype(x.dtype), None


def _shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Returns every ``stride``-th pixel, between channels of zeros."""
    more = features - x.shape[0]
    x = x[:, :, ::stride, ::stride]
    return jnp.pad(x, ((more // 2, more - more // 2), (0, 0), (0, 0), (0, 0)))


class Stage(nn.Module):
    """A first block that may change the shape, then identical blocks, scanned to compile once."""

    features: int
    stride: int
    blocks: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Applies the layer."""
        shape = (self.features, x.shape[1], *(-(n // -self.stride) for n in x.shape[2:]))
        kind: Any = Block
        options: Any = self.train
        if self.train and conv_tpu.suits(shape, x.dtype):
            kind, options = FusedBlock, shape[2:]
            mask = jnp.ones(x.shape[1], bool) if mask is None else mask
        x, _ = kind(self.features, self.stride, options, name="first")(x, mask)
        if self.blocks > 1:
            scanned = nn.scan(
                kind,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                in_axes=cast(int, nn.broadcast),  # flax's annotation omits its constant
                length=self.blocks - 1,
            )
            x, _ = scanned(self.features, 1, options, name="rest")(x, mask)
        return x.reshape(shape)


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
        shape = (_WIDTHS[0], *x.shape[1:])
        if not (self.train and conv_tpu.suits(shape, x.dtype)):
            x = Conv(_WIDTHS[0], name="conv")(x)
            return nn.relu(BatchNorm(name="bn")(x, train=self.train, mask=mask))
        mask = jnp.ones(x.shape[1], bool) if mask is None else mask
        kernel = ConvKernel(_WIDTHS[0], name="conv")(len(x))
        as_is = x.reshape(len(x), -1), jnp.ones(len(x)), jnp.zeros(len(x))
        sides = shape[2], shape[3]
        y, statistics = conv_tpu.conv_after(*as_is, kernel, mask, sides, relu=False)
        gain, shift = FoldedBatchNorm(name="bn")(*statistics)
        return nn.relu(gain[:, None] * y + shift[:, None]).astype(x.dtype).reshape(shape)


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
