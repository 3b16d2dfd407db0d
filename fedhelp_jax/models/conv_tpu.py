"""Implements a residual network's convolution as one kernel for TPUs, with what surrounds it.

In a residual block, most of the time goes to moving activations between the chip and its memory.
The kernel applies the normalisation and the ReLU of the layer before while it loads activations,
and takes the statistics of the next normalisation while it stores them. An activation is thus read
once and written once a layer. Its gradient is a single kernel, too, which reads three arrays and
writes one. XLA's own convolutions, normalisations and their gradients move these several times,
padded to the chip's tiles.

Images lie next to each other in the long axis of a matrix ``[C, B * H * W]``, so that no tile is
padded. A convolution is the product of its kernel and nine copies of that matrix, each shifted by
an offset of the kernel; the copies exist on the chip only, for a few images at a time.

`benchmarks.aot` compiles these kernels for TPU v5e chips; tests interpret them on the CPU. **No TPU
has run them yet.**
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from fedhelp_jax.core.compilation import traced_for
from fedhelp_jax.models.conv import context_precision
from fedhelp_jax.typing import PyTree

_LANES, _SUBLANES = 128, 8
# Of a chip's 16 MiB for a kernel, this much is used for the shifted copies. The rest is for blocks
# of activations, of which the chip holds two of each kind, one of them being loaded or stored.
_COPIES = 5 * 2**19
# With 64 channels of 8x8 pixels, XLA pads little and moves as few bytes.
_MOST_CHANNELS = 32


class Statistics(NamedTuple):
    """Mean and biased variance per channel, ``[C]``, and the number of values that they are of."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


class Geometry(NamedTuple):
    """What a kernel has to know besides its arrays; ``images`` are those of a block."""

    height: int
    width: int
    images: int
    relu: bool
    precision: Any

    @property
    def block(self) -> int:
        """The number of pixels in a block."""
        return self.images * self.height * self.width


def suits(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Returns whether to use the kernel for a layer with results ``[C, B, H, W]`` of that dtype.

    It is for programs for TPUs, for the shapes that it can handle, and where it was counted to move
    fewer bytes than XLA's own operations.
    """
    return (
        traced_for() == "tpu"
        and len(shape) == 4
        and dtype in (jnp.float32, jnp.bfloat16)
        and shape[0] % _SUBLANES == 0
        and shape[0] <= _MOST_CHANNELS
        and _images_in_block(shape, shape[0]) > 0
    )


def statistics_of(x: jax.Array, mask: jax.Array) -> Statistics:
    """Returns the `Statistics` of ``[C, B * H * W]`` over the images where ``mask`` is true."""
    weight = _weights(x, mask)
    count = jnp.sum(weight)
    x, total = x.astype(jnp.float32), jnp.maximum(count, 1)
    mean = jnp.sum(x * weight, axis=1) / total
    var = jnp.sum(jnp.square(x - mean[:, None]) * weight, axis=1) / total
    return Statistics(mean, var, count)


def conv_after(
    x: jax.Array,
    gain: jax.Array,
    shift: jax.Array,
    kernel: jax.Array,
    mask: jax.Array,
    sides: tuple[int, int],
    *,
    relu: bool = True,
) -> tuple[jax.Array, Statistics]:
    """Computes a 3x3 convolution of ``relu(gain * x + shift)``, and its results' statistics.

    The convolution has stride 1 and is padded by zeros ("same"). Everything is differentiable,
    including the statistics, by gradients that are kernels too.

    Args:
      x: ``[C, B * H * W]`` float32 or bfloat16; it `suits`.
      gain: ``[C]`` float32.
      shift: ``[C]`` float32.
      kernel: ``[3, 3, C, O]`` float32. Products are in x's dtype, and sums in float32.
      mask: ``[B]`` boolean, the images that the statistics are over.
      sides: ``(H, W)``.
      relu: Whether there is a ReLU.

    Returns:
      The result ``[O, B * H * W]`` in x's dtype, and its `Statistics` over ``B``, ``H`` and ``W``.
    """
    more = -x.shape[0] % _SUBLANES
    if more:  # else a loop over blocks would store x for the gradient twice, padded by nothing
        x = jnp.pad(x, ((0, more), (0, 0)))
        gain, shift = (jnp.pad(a, (0, more)) for a in (gain, shift))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
    (height, width), places = sides, sides[0] * sides[1]
    shape = (kernel.shape[-1], x.shape[1] // places, height, width)
    images = _images_in_block(shape, x.shape[0])
    how = Geometry(height, width, images, relu, _precision())
    weight = _weights(x, mask)
    affine = jnp.stack([gain, shift], axis=1)
    out, blocks = cast(PyTree, _conv_after(x, affine, kernel, weight, how))
    # The statistics of blocks are merged as in Chan et al. (1983), which does not cancel.
    counts = jnp.sum(weight.reshape(-1, 1, how.block), axis=2)
    count = jnp.sum(counts)
    total = jnp.maximum(count, 1)
    means, squares = blocks[..., 0], blocks[..., 1]
    mean = jnp.sum(counts * means, axis=0) / total
    var = jnp.sum(squares + counts * jnp.square(means - mean), axis=0) / total
    return out, Statistics(mean, var, count)


def _weights(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns ``[1, B * H * W]``, which is 1 for the pixels of the images of the mask, else 0."""
    length = x.shape[1]
    weight = jnp.repeat(mask.astype(jnp.float32), length // len(mask), total_repeat_length=length)
    return weight[None]


def _images_in_block(shape: tuple[int, ...], channels: int) -> int:
    """Returns how many images the kernel for a layer handles at a time; 0 if there is none."""
    features, batch, height, width = shape
    most = _COPIES // (9 * 4 * max(channels, features) * height * width)
    whole = (n for n in range(min(most, batch), 0, -1) if batch % n == 0)
    return next((n for n in whole if n * height * width % _LANES == 0), 0)


def _precision() -> str:
    """Returns the precision of the context; a kernel's products have one or six passes."""
    return "default" if context_precision() in (None, "default") else "highest"


def _kernels() -> ModuleType:
    # Importing Pallas takes a while, which runs on other devices need not wait for.
    from fedhelp_jax.models import conv_tpu_kernels

    return conv_tpu_kernels


# --- the gradient -------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _conv_after(
    x: jax.Array, affine: jax.Array, kernel: jax.Array, weight: jax.Array, how: Geometry
) -> PyTree:
    """Returns the convolution ``[O, N]``, and per block means and sums of squares ``[., O, 2]``."""
    matrix = kernel.transpose(3, 0, 1, 2).reshape(kernel.shape[-1], -1)
    return _kernels().value(x, affine, matrix.astype(x.dtype), weight, how)


def _forward(x, affine, kernel, weight, how):
    out, blocks = cast(PyTree, _conv_after(x, affine, kernel, weight, how))
    return (out, blocks), (x, affine, kernel, weight, out, blocks)


def _backward(how, residuals, grads):
    x, affine, kernel, weight, out, blocks = residuals
    out_grad, blocks_grad = grads
    counts = jnp.maximum(jnp.sum(weight.reshape(-1, 1, how.block), axis=2), 1)
    # By its part in the mean, every value of a block has the same gradient; by its part in the sum
    # of squares, twice its distance from the mean.
    statistics = jnp.stack(
        [blocks[..., 0], blocks_grad[..., 0] / counts, 2 * blocks_grad[..., 1]], axis=2
    )
    channels, outputs = kernel.shape[2:]
    matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1).astype(x.dtype)
    x_grad, affine_grad, matrix_grad = _kernels().gradients(
        x, affine, matrix, weight, out, statistics, out_grad, how
    )
    kernel_grad = matrix_grad.reshape(channels, 3, 3, outputs).transpose(1, 2, 0, 3)
    return x_grad, affine_grad, kernel_grad, jnp.zeros_like(weight)


_conv_after.defvjp(_forward, _backward)
