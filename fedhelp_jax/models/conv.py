"""Implements convolutions as patches and matrix products, on CPU a few images at a time.

``lax.conv_general_dilated`` is not used because under ``vmap`` over clients it becomes a grouped
convolution, and because XLA's CPU back end runs any convolution inside a loop with naive code. Both
are tens of times slower than the product below (``docs/performance.md``). Activations are channels
first, ``[C, B, *spatial]``, of any spatial rank, so that the product's long side is contiguous.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedhelp_jax.typing import PyTree

# Patches of more bytes than this are made in parts, because those of a wide 3D convolution, 27
# times its input, would not fit in memory. Below this size, a single product is the fastest.
_PATCH_BYTES = 2**28
# On CPU, as many images are multiplied together as have patches of up to _TILE_BYTES, so that the
# patches are still in the core's cache. Products of more than _TILE_ROWS rows are not tiled: they
# use each patch so much that memory keeps up. Nor are those of bfloat16: XLA would cast the tiles.
_TILE_BYTES, _TILE_ROWS = 640 * 2**10, 32


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int | None = None) -> jax.Array:
    """Computes a cross-correlation without bias.

    ``out[o, b, p] = sum_{c, q} kernel[q, c, o] * x[c, b, stride * p + q - padding]``

    The value and both gradients equal those of ``lax.conv_general_dilated`` with that padding, up
    to float32 rounding. Products are computed in x's dtype, to which the kernel is cast; sums are
    in float32, or in x's dtype if that is wider. With bfloat16 activations and a float32 kernel,
    the values and the gradient with respect to ``x`` are therefore rounded once, at the end, and
    the kernel's gradient is never rounded.

    Args:
      x: ``[C_in, B, *spatial]`` activations, any number of spatial axes.
      kernel: ``[*(k,) * rank, C_in, C_out]``, ``k`` odd.
      stride: Step between outputs, the same along every axis.
      padding: Zeros on every side, at most ``k - 1``; ``k // 2`` ("same") if None.

    Returns:
      ``[C_out, B, *out]`` of x's dtype with ``out = (spatial + 2 padding - k) // stride + 1``,
      which is ``ceil(spatial / stride)`` for "same".
    """
    return _conv(x, kernel, stride, kernel.shape[0] // 2 if padding is None else padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    window = _window(x, kernel.shape[0], stride, padding)
    rows = kernel.shape[-1]
    return _over_tiles(lambda x: _multiply(x, kernel, None, window), window, rows, x)[0]


def _forward(x, kernel, stride, padding):
    # The patches, 9 or 27 times the size of x, are recomputed in the backward pass, not kept.
    return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, out_grad):
    x, kernel = residuals
    size = kernel.shape[0]
    if stride == 1 and x.shape[0] >= out_grad.shape[0]:
        # The gradient with respect to x is also a correlation, of the output's gradient with the
        # flipped, transposed kernel. Its patches also serve for the kernel's gradient.
        window = _window(out_grad, size, 1, size - 1 - padding)
        flipped = _flipped(kernel)
        x_grad, kernel_grad = _over_tiles(
            lambda grad, x: _multiply(grad, flipped, x, window), window, len(x), out_grad, x
        )
        return x_grad, _flipped(kernel_grad.reshape(flipped.shape)).astype(kernel.dtype)
    # With a stride, those patches would be mostly zeros; if out_grad has more channels than x, they
    # would be larger.
    window = _window(x, size, stride, padding)
    x_grad, kernel_grad = _over_tiles(
        lambda x, grad: _pull_back(x, kernel, grad, window), window, len(out_grad), x, out_grad
    )
    return x_grad, kernel_grad.reshape(kernel.shape).astype(kernel.dtype)


_conv.defvjp(_forward, _backward)


class _Window(NamedTuple):
    """How patches are taken: kernel size, stride, padding, and their number along each axis."""

    size: int
    stride: int
    padding: int
    out: tuple[int, ...]


def _window(x: jax.Array, size: int, stride: int, padding: int) -> _Window:
    out = tuple((n + 2 * padding - size) // stride + 1 for n in x.shape[2:])
    return _Window(size, stride, padding, out)


def _flipped(kernel: jax.Array) -> jax.Array:
    return jnp.flip(kernel, tuple(range(kernel.ndim - 2))).swapaxes(-1, -2)


def _over_tiles(
    fn: Callable[..., tuple[PyTree, PyTree]], window: _Window, rows: int, *arrays: jax.Array
) -> PyTree:
    """Computes ``fn(*arrays)``, on CPU a few images at a time.

    Args:
      fn: Returns ``(result [C, B, ...], terms that are summed over images)``.
      window: The window of the first array's patches.
      rows: The number of rows of the product with these patches.
      *arrays: ``[C, B, *spatial]``.
    """
    batch = arrays[0].shape[1]
    images = _images_at_once(arrays[0], window, rows)
    if images == batch:
        return fn(*arrays)

    def add(sums: PyTree, tiles: PyTree) -> tuple[PyTree, PyTree]:
        result, more = fn(*tiles)
        return jax.tree.map(jnp.add, sums, more), result

    tiles = [jnp.moveaxis(x.reshape(len(x), -1, images, *x.shape[2:]), 1, 0) for x in arrays]
    sums = jax.eval_shape(fn, *(tile[0] for tile in tiles))[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)
    sums, results = lax.scan(add, zeros, tiles)
    results = jnp.moveaxis(results, 0, 1)
    return results.reshape(len(results), batch, *results.shape[3:]), sums


def _images_at_once(x: jax.Array, window: _Window, rows: int) -> int:
    """Returns how many images are multiplied together: all on accelerators, fewer on CPU."""
    if rows > _TILE_ROWS or x.dtype == jnp.bfloat16 or jax.default_backend() != "cpu":
        return x.shape[1]
    patch = window.size ** len(window.out) * x.shape[0] * x.dtype.itemsize
    most = max(1, _TILE_BYTES // (patch * math.prod(window.out)))
    return max(n for n in range(1, x.shape[1] + 1) if x.shape[1] % n == 0 and n <= most)


def _multiply(x: jax.Array, kernel: jax.Array, other: jax.Array | None, window: _Window) -> PyTree:
    """Returns ``kernel.T @ patches`` of x, ``[C_out, B, *out]``, and ``patches @ other.T``.

    Without ``other``, the second product is empty.
    """
    groups = _offset_groups(x, window)
    kernels = kernel.reshape(len(groups), -1, kernel.shape[-1])
    columns = None if other is None else _columns(other.reshape(len(other), -1))

    def part(leading: PyTree, kernel: PyTree) -> tuple[PyTree, PyTree]:
        patches = _patches(x, leading, window)
        product = _dot(_transposed(kernel, x.dtype), patches)
        return product, () if columns is None else _dot(patches, *columns)

    def add(total: jax.Array, group: PyTree) -> tuple[PyTree, PyTree]:
        product, rows = part(*group)
        return total + product, rows

    if len(groups) == 1:
        product, rows = part(groups[0], kernels[0])
    else:
        zeros = jnp.zeros((kernel.shape[-1], x.shape[1] * math.prod(window.out)), _sum_dtype(x))
        product, rows = lax.scan(add, zeros, (jnp.asarray(groups), kernels))
    return product.astype(x.dtype).reshape(-1, x.shape[1], *window.out), rows


def _pull_back(x: jax.Array, kernel: jax.Array, out_grad: jax.Array, window: _Window) -> PyTree:
    """Returns both gradients from the patches of the forward pass.

    The gradient of x is that of the patches, put back in place.
    """
    groups = _offset_groups(x, window)
    kernels = kernel.reshape(len(groups), -1, kernel.shape[-1]).astype(x.dtype)
    rows = out_grad.reshape(len(out_grad), -1)
    zeros = jnp.zeros_like(x, _sum_dtype(x))

    def add(x_grad: PyTree, group: PyTree) -> tuple[PyTree, PyTree]:
        leading, kernel = group
        put_back = jax.linear_transpose(lambda x: _patches(x, leading, window), zeros)
        x_grad += put_back(_dot(kernel, rows))[0]
        return x_grad, _dot(_patches(x, leading, window), *_columns(rows))

    if len(groups) == 1:
        x_grad, kernel_grad = add(0, (groups[0], kernels[0]))
    else:
        x_grad, kernel_grad = lax.scan(add, zeros, (jnp.asarray(groups), kernels))
    return x_grad.astype(x.dtype), kernel_grad


def _dot(a: jax.Array, b: jax.Array, axis: int = 0) -> jax.Array:
    """Multiplies ``a`` by ``b``, summing over b's ``axis``; the result has their `_sum_dtype`."""
    if _bfloat16_on_cpu(a):
        # XLA multiplies bfloat16 without casting to float32 only if no operand has a transposed
        # layout, and must not find one after deciding so. The barrier hides how they are made.
        a, b = lax.optimization_barrier((a, b))
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=_sum_dtype(a))


def _sum_dtype(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _transposed(matrix: jax.Array, dtype: Any) -> jax.Array:
    """Returns ``matrix.T``, cast; the intermediate reshape avoids a transposed layout."""
    return matrix.T[None].astype(dtype)[0]


def _columns(rows: jax.Array) -> tuple[jax.Array, int]:
    """Returns the arguments that make `_dot` multiply by ``rows.T``."""
    return (rows, 1) if _bfloat16_on_cpu(rows) else (rows.T, 0)


def _bfloat16_on_cpu(x: jax.Array) -> bool:
    return x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes a transposed convolution whose stride is the kernel's size, without overlap.

    ``out[o, b, k * p + q] = sum_c kernel[q, c, o] * x[c, b, p]``

    It equals ``lax.conv_transpose`` with stride ``k``, padding "VALID" and the kernel flipped,
    which is ``torch.nn.ConvTranspose2d(..., k, stride=k)``.

    Args:
      x: ``[C_in, B, *spatial]``, any number of spatial axes.
      kernel: ``[*(k,) * rank, C_in, C_out]``. Dtypes are as in :func:`conv`.

    Returns:
      ``[C_out, B, *(k * spatial)]`` of x's dtype.
    """
    size, rank = kernel.shape[0], x.ndim - 2
    matrix = jnp.moveaxis(kernel, -2, -1).reshape(-1, x.shape[0])
    blocks = _product(matrix, x.reshape(x.shape[0], -1))
    return _from_blocks(blocks.reshape(*(size,) * rank, kernel.shape[-1], *x.shape[1:]))


@jax.custom_vjp
def _product(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Returns ``matrix @ x``; autodiff would round the matrix's gradient to x's dtype."""
    return _dot(matrix.astype(x.dtype), x).astype(x.dtype)


def _product_forward(matrix, x):
    return _product(matrix, x), (matrix, x)


def _product_backward(residuals, out_grad):
    matrix, x = residuals
    x_grad = _dot(_transposed(matrix, x.dtype), out_grad)
    return _dot(out_grad, *_columns(x)).astype(matrix.dtype), x_grad.astype(x.dtype)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Computes max pooling by 2 along each spatial axis, whose lengths must be even.

    It uses slices and comparisons, because in a loop XLA's CPU back end is also slow at pooling
    windows. The gradient goes to the first of equal largest values, as in PyTorch, at a stored
    position. Autodiff of ``jnp.max`` would instead look for values equal to the maximum and divide
    by their number, which is 0 if a compiler rounds ``x`` differently the second time.

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
    """Returns ``2**rank`` arrays ``[C, B, *(spatial / 2)]``, one per position in a block."""
    shape = [n for length in x.shape[2:] for n in (length // 2, 2)]
    blocks = x.reshape(*x.shape[:2], *shape)
    places = itertools.product(range(2), repeat=x.ndim - 2)
    return [
        blocks[(slice(None), slice(None), *(i for q in place for i in (slice(None), q)))]
        for place in places
    ]


def _from_blocks(blocks: jax.Array) -> jax.Array:
    """Rearranges ``[*(k,) * rank, C, B, *spatial]`` into ``[C, B, *(k * spatial)]``."""
    rank = (blocks.ndim - 2) // 2
    order = [rank, rank + 1]
    for axis in range(rank):
        order += [rank + 2 + axis, axis]
    sides = (blocks.shape[axis] * blocks.shape[rank + 2 + axis] for axis in range(rank))
    return blocks.transpose(order).reshape(*blocks.shape[rank : rank + 2], *sides)


def _offset_groups(x: jax.Array, window: _Window) -> np.ndarray:
    """Returns the leading offsets of each part of the patches, ``[G, i]``.

    ``i`` is the smallest number of leading axes with which a part fits in memory.
    """
    rank, size = x.ndim - 2, window.size
    one = x.shape[0] * x.shape[1] * math.prod(window.out) * x.dtype.itemsize
    fixed = next((i for i in range(rank) if one * size ** (rank - i) <= _PATCH_BYTES), rank)
    offsets = list(itertools.product(range(size), repeat=fixed))
    return np.array(offsets, int).reshape(len(offsets), fixed)


def _patches(x: jax.Array, leading: jax.Array | np.ndarray, window: _Window) -> jax.Array:
    """Extracts patches, ``[C, B, *spatial] -> [size**(rank - i) * C, B * out]``.

    Rows are in the order of the flattened kernel. The first i axes are shifted by ``leading``, the
    others by every offset, one axis at a time. Such shifted copies of shifted copies run faster and
    compile faster than a slice per offset.
    """
    rank, (size, stride, padding, out) = x.ndim - 2, window
    dtype = x.dtype
    if _bfloat16_on_cpu(x):
        # Otherwise XLA would cast to float32 and back around each copy.
        x = lax.bitcast_convert_type(x, jnp.uint16)
    x = jnp.pad(x, [(0, 0), (0, 0)] + [(padding, padding)] * rank)
    for axis in reversed(range(rank)):
        # Counted from the end, because offsets of the axes done before are in front.
        along, extent = x.ndim - rank + axis, stride * (out[axis] - 1) + 1
        if axis < len(leading):
            shifted = lax.dynamic_slice_in_dim(x, leading[axis], extent, along)
            x = lax.slice_in_dim(shifted, 0, None, stride, along)
        else:
            ends = ((offset, offset + extent) for offset in range(size))
            x = jnp.stack([lax.slice_in_dim(x, *end, stride, along) for end in ends])
    x = x.reshape(-1, x.shape[-rank - 1] * math.prod(out))
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
