"""Provides U-Nets of any spatial rank (Ronneberger et al., arXiv:1505.04597; 3D: 1606.06650)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedhelp_jax.models.conv import max_pool
from fedhelp_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvTranspose,
    GroupNorm,
    linen_model,
)
from fedhelp_jax.models.model import Model

NORMS = ("batch", "group", "none")


class UNetSize(NamedTuple):
    """Channels of each level, from the finest to the coarsest, and convolutions per level."""

    widths: tuple[int, ...]
    convs: int


# The first two are the paper's; the others fit two CPU cores.
UNETS = {
    "unet_small": UNetSize((64, 128, 256, 512, 1024), 2),
    "unet_large": UNetSize((128, 256, 512, 1024, 2048), 3),
    "unet_small_cpu": UNetSize((8, 16, 32, 64), 2),
    "unet_large_cpu": UNetSize((16, 32, 64, 128), 3),
}


class Level(nn.Module):
    """3-wide convolutions, each followed by normalisation and a ReLU."""

    features: int
    convs: int
    norm: str
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Applies the layer."""
        for i in range(1, self.convs + 1):
            x = Conv(self.features, use_bias=self.norm == "none", name=f"conv{i}")(x)
            if self.norm == "batch":
                x = BatchNorm(name=f"norm{i}")(x, train=self.train, mask=mask)
            elif self.norm == "group":
                x = GroupNorm(name=f"norm{i}")(x)
            x = nn.relu(x)
        return x


class UNetFeatures(nn.Module):
    """Maps ``[B, *spatial, C]`` to ``[B, *spatial, widths[0]]``: a U-Net without its head.

    Sizes that are not divisible by the pooling are padded with edge values and cropped again.
    """

    widths: tuple[int, ...]
    convs: int
    norm: str
    remat: bool
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Applies the layer."""
        level = nn.remat(Level) if self.remat else Level
        spatial = x.shape[1:-1]
        multiple = 2 ** (len(self.widths) - 1)
        pads = [divmod(-n % multiple, 2) for n in spatial]
        pads = [(half, half + odd) for half, odd in pads]
        x = jnp.pad(jnp.moveaxis(x, -1, 0), [(0, 0), (0, 0), *pads], mode="edge")

        def at_level(side: str, i: int, x: jax.Array) -> jax.Array:
            features = self.widths[i]
            return level(features, self.convs, self.norm, self.train, name=f"{side}{i}")(x, mask)

        skips = []
        for i in range(len(self.widths) - 1):
            skips.append(at_level("down", i, x))
            x = max_pool(skips[-1])
        x = at_level("down", len(self.widths) - 1, x)
        for i in reversed(range(len(self.widths) - 1)):
            up = ConvTranspose(self.widths[i], name=f"grow{i}")(x)
            x = at_level("up", i, jnp.concatenate([skips[i], up]))
        crop = tuple(
            slice(before, before + n) for (before, _), n in zip(pads, spatial, strict=True)
        )
        return jnp.moveaxis(x[(slice(None), slice(None), *crop)], 0, -1)


def unet(size: UNetSize, num_classes: int, *, norm: str = "batch", remat: bool = False) -> Model:
    """Returns a U-Net over as many spatial axes as the images have.

    Each level has ``size.convs`` 3-wide convolutions. The network uses max pooling by 2 on the way
    down, transposed convolutions of size 2 on the way up, skip connections joined by concatenation,
    and He initialisation.

    Args:
      size: Channels of each level and convolutions per level; ``UNETS`` names some choices.
      num_classes: Width ``C`` of the head: 1 for one foreground class.
      norm: "batch" (as in PyTorch), "group" (8 groups), or "none" (convolutions then have a bias).
      remat: Whether the backward pass recomputes each level's activations instead of keeping them,
        which takes a third more time and far less memory.

    Returns:
      A :class:`Model` of images ``[B, *spatial, channels]`` of any size. ``features`` returns ``[B,
      *spatial, widths[0]]``; ``head``, a convolution of size one, returns ``[B, *spatial, C]``.

    Raises:
      ValueError: If ``norm`` is none of the three or does not fit the widths, or the size has no
        levels or convolutions.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not size.widths or min(size.widths) < 1 or size.convs < 1:
        raise ValueError(f"a U-Net needs widths and convolutions, got {size}")
    if norm == "group" and any(width > 8 and width % 8 for width in size.widths):
        raise ValueError(f"norm group needs widths of at most 8 or multiples of 8, got {size}")

    return linen_model(
        lambda train: UNetFeatures(size.widths, size.convs, norm, remat, train),
        size.widths[0],
        num_classes,
    )
