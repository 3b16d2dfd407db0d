"""Convolution as patches and matrix products, the same program on CPU and accelerators.

Why not ``lax.conv_general_dilated``: under ``vmap`` over clients it becomes a grouped convolution,
and inside a loop XLA's CPU back end runs any convolution by naive code; both are tens of times
slower than the product below (``docs/performance.md``). Activations are channels first, ``[C, B,
*spatial]``, of any spatial rank: the long side of the product is then the contiguous one.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Patches of more bytes than this are made a part at a time: those of a wide 3D convolution, 27
# times its input, would not fit in memory. Below it one product is the fastest.
_PATCH_BYTES = 2**28


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
    groups = _offset_groups(x, kernel.shape[0], stride)
    kernels = kernel.reshape(len(groups), -1, kernel.shape[-1])
    out_shape = (kernel.shape[-1], x.shape[1], *_out_extent(x, stride))
    if len(groups) == 1:
        return (kernels[0].T @ _patches(x, groups[0], kernel.shape[0], stride)).reshape(out_shape)

    def add(total: jax.Array, group: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        leading, part = group
        return total + part.T @ _patches(x, leading, kernel.shape[0], stride), None

    zeros = jnp.zeros((out_shape[0], int(np.prod(out_shape[1:]))), x.dtype)
    return lax.scan(add, zeros, (jnp.asarray(groups), kernels))[0].reshape(out_shape)


def _forward(x, kernel, stride):
    # The patches, 9 or 27 times the size of x, are made again in the backward pass, not kept.
    return conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, out_grad):
    x, kernel = residuals
    size = kernel.shape[0]
    groups = _offset_groups(x, size, stride)
    columns = out_grad.reshape(out_grad.shape[0], -1).T

    def part(leading: jax.Array | np.ndarray) -> jax.Array:
        return _patches(x, leading, size, stride) @ columns

    kernel_grad = part(groups[0]) if len(groups) == 1 else lax.map(part, jnp.asarray(groups))
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


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution whose stride is the kernel's size: every input becomes a block.

    ``out[o, b, k * p + q] = sum_c kernel[q, c, o] * x[c, b, p]``

    Equal to ``lax.conv_transpose`` with stride ``k``, padding "VALID" and the kernel flipped, which
    is ``torch.nn.ConvTranspose2d(..., k, stride=k)``.

    Args:
      x: ``[C_in, B, *spatial]``, any number of spatial axes.
      kernel: ``[*(k,) * rank, C_in, C_out]``.

    Returns:
      ``[C_out, B, *(k * spatial)]``.
    """
    size, rank = kernel.shape[0], x.ndim - 2
    matrix = jnp.moveaxis(kernel, -2, -1).reshape(-1, x.shape[0])
    blocks = matrix @ x.reshape(x.shape[0], -1)
    return _from_blocks(blocks.reshape(*(size,) * rank, kernel.shape[-1], *x.shape[1:]))


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """The largest of every block of two along each spatial axis, which two must divide.

    Slices and comparisons: in a loop, XLA's CPU back end is slow at pooling windows too. The
    gradient goes to the first of equal largest ones, as in PyTorch. It goes by a stored position:
    autodiff of ``jnp.max`` would look for what equals the maximum, and find nothing, and divide by
    that nothing, where a compiler rounds ``x`` otherwise the second time.

    Args:
      x: ``[C, B, *spatial]``.

    Returns:
      ``[C, B, *(spatial / 2)]``.
    """
    return _max_pool_forward(x)[0]


def _max_pool_forward(x):
    corners = _corners(x)
    largest, position = corners[0], jnp.zeros(corners[0].shape, jnp.uint8)
    for number, corner in enumerate(corners[1:], start=1):
        better = (corner > largest) | jnp.isnan(corner)
        largest = jnp.where(better, corner, largest)
        position = jnp.where(better, jnp.uint8(number), position)
    return largest, position


def _max_pool_backward(position, out_grad):
    rank = position.ndim - 2
    zero = jnp.zeros((), out_grad.dtype)
    parts = [jnp.where(position == number, out_grad, zero) for number in range(2**rank)]
    return (_from_blocks(jnp.stack(parts).reshape(*(2,) * rank, *position.shape)),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _corners(x: jax.Array) -> list[jax.Array]:
    """The ``2**rank`` arrays ``[C, B, *(spatial / 2)]`` of each place in a block."""
    shape = [n for length in x.shape[2:] for n in (length // 2, 2)]
    blocks = x.reshape(*x.shape[:2], *shape)
    places = itertools.product(range(2), repeat=x.ndim - 2)
    return [
        blocks[(slice(None), slice(None), *(i for q in place for i in (slice(None), q)))]
        for place in places
    ]


def _from_blocks(blocks: jax.Array) -> jax.Array:
    """``[*(k,) * rank, C, B, *spatial] -> [C, B, *(k * spatial)]``."""
    rank = (blocks.ndim - 2) // 2
    order = [rank, rank + 1]
    for axis in range(rank):
        order += [rank + 2 + axis, axis]
    sides = (blocks.shape[axis] * blocks.shape[rank + 2 + axis] for axis in range(rank))
    return blocks.transpose(order).reshape(*blocks.shape[rank : rank + 2], *sides)


def _out_extent(x: jax.Array, stride: int) -> tuple[int, ...]:
    return tuple(-(-n // stride) for n in x.shape[2:])


def _offset_groups(x: jax.Array, size: int, stride: int) -> np.ndarray:
    """``[G, i]``: the leading offsets that parts of the patches have, i such that a part fits."""
    rank = x.ndim - 2
    one = x.shape[0] * x.shape[1] * int(np.prod(_out_extent(x, stride))) * x.dtype.itemsize
    fixed = next((i for i in range(rank) if one * size ** (rank - i) <= _PATCH_BYTES), rank)
    offsets = list(itertools.product(range(size), repeat=fixed))
    return np.array(offsets, int).reshape(len(offsets), fixed)


def _patches(x: jax.Array, leading: jax.Array | np.ndarray, size: int, stride: int) -> jax.Array:
    """``[C, B, *spatial] -> [size**(rank - i) * C, B * out]``, in the order of the flat kernel.

    The first i axes are shifted by ``leading``, the others by every offset, an axis at a time:
    shifted copies of shifted copies, which run faster and compile faster than a slice per offset.
    """
    rank, out = x.ndim - 2, _out_extent(x, stride)
    pad = size // 2
    x = jnp.pad(x, [(0, 0), (0, 0)] + [(pad, pad)] * rank)
    for axis in reversed(range(rank)):
        # Counted from the end: in front stand the offsets along the axes done before.
        along, extent = x.ndim - rank + axis, stride * (out[axis] - 1) + 1
        if axis < len(leading):
            shifted = lax.dynamic_slice_in_dim(x, leading[axis], extent, along)
            x = lax.slice_in_dim(shifted, 0, None, stride, along)
        else:
            ends = ((offset, offset + extent) for offset in range(size))
            x = jnp.stack([lax.slice_in_dim(x, *end, stride, along) for end in ends])
    return x.reshape(-1, x.shape[-rank - 1] * int(np.prod(out)))
