"""Convolution as patches and one matrix product, the same program on CPU and accelerators.

Why not ``lax.conv_general_dilated``: under ``vmap`` over clients it becomes a grouped convolution,
and inside a loop XLA's CPU back end runs any convolution by naive code; both are tens of times
slower than the product below (``docs/performance.md``). Activations are channels first, ``[C, B,
*spatial]``: the long side of the product is then the contiguous one.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Cross-correlation with "same" padding ``k // 2`` on every side, without bias.

    ``out[o, b, p] = sum_{c, q} kernel[q, c, o] * x[c, b, stride * p + q - k // 2]``

    Equal to ``lax.conv_general_dilated`` with that padding to float32 rounding, in value and in
    both gradients.

    Args:
      x: ``[C_in, B, *spatial]`` activations, any number of spatial axes.
      kernel: ``[*(k,) * rank, C_in, C_out]``, ``k`` odd.
      stride: Step between outputs, the same along every axis.

    Returns:
      ``[C_out, B, *out]`` with ``out = ceil(spatial / stride)``.
    """
    return _product(_flat(kernel).T, _patches(x, kernel.shape[0], stride))


def _forward(x, kernel, stride):
    # The patches, 9 times the size of x, are made again in the backward pass instead of being kept.
    return conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, out_grad):
    x, kernel = residuals
    size = kernel.shape[0]
    patches = _patches(x, size, stride)
    rows = patches.reshape(patches.shape[0], -1)
    kernel_grad = rows @ out_grad.reshape(out_grad.shape[0], -1).T
    # The gradient by x is a "same" correlation too: of the gradient, spread out to the input's
    # grid, with the flipped, transposed kernel.
    spread = [
        (0, n - stride * (m - 1) - 1, stride - 1)
        for n, m in zip(x.shape[2:], out_grad.shape[2:], strict=True)
    ]
    out_grad = lax.pad(out_grad, jnp.zeros((), out_grad.dtype), [(0, 0, 0)] * 2 + spread)
    flipped = jnp.flip(kernel, tuple(range(kernel.ndim - 2))).swapaxes(-1, -2)
    x_grad = conv(out_grad, flipped, 1)
    return x_grad, kernel_grad.reshape(kernel.shape)


conv.defvjp(_forward, _backward)


def _flat(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(-1, kernel.shape[-1])


def _product(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return (matrix @ x.reshape(x.shape[0], -1)).reshape(matrix.shape[0], *x.shape[1:])


def _patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """``[C, B, *spatial] -> [size**rank * C, B, *out]``, in the order of the flat kernel."""
    rank = x.ndim - 2
    strided = (slice(None), slice(None), *(slice(None, None, stride),) * rank)
    if size == 1:
        return x[strided]
    pad = size // 2
    padded = jnp.pad(x, [(0, 0), (0, 0)] + [(pad, pad)] * rank)
    extent = (*x.shape[:2], *(stride * (-(-n // stride) - 1) + 1 for n in x.shape[2:]))
    offsets = list(itertools.product(range(size), repeat=rank))

    def shifted(offset: Sequence[jax.Array | int]) -> jax.Array:
        return lax.dynamic_slice(padded, (0, 0, *offset), extent)[strided]

    if jax.default_backend() == "cpu":
        # A loop compiles two to three times faster than a slice per offset and runs as fast; an
        # accelerator would wait for the host at each turn.
        patches = lax.map(shifted, jnp.array(offsets))
        return patches.reshape(-1, *patches.shape[2:])
    return jnp.concatenate([shifted(offset) for offset in offsets])
