"""The Pallas kernels of `conv_tpu`, which imports them for programs for TPUs only."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedhelp_jax.models.conv_tpu import Geometry


def value(
    x: jax.Array, affine: jax.Array, matrix: jax.Array, weight: jax.Array, how: Geometry
) -> tuple[jax.Array, jax.Array]:
    """Returns the convolution ``[O, N]``, and per block means and sums of squares ``[., O, 2]``.

    Args:
      x: ``[C, N]``.
      affine: ``[C, 2]``: gain and shift.
      matrix: ``[O, 9 C]`` of x's dtype.
      weight: ``[1, N]``.
      how: The geometry.
    """
    length, outputs = x.shape[1], matrix.shape[0]
    blocks = length // how.block
    return pl.pallas_call(
        functools.partial(_value_kernel, how=how),
        grid=(blocks,),
        in_specs=_inputs(x, matrix, how),
        out_specs=[_columns(outputs, how), _of_block(outputs, 2)],
        out_shape=[
            jax.ShapeDtypeStruct((outputs, length), x.dtype),
            jax.ShapeDtypeStruct((blocks, outputs, 2), jnp.float32),
        ],
    )(x, affine, matrix, weight)


def gradients(
    x: jax.Array,
    affine: jax.Array,
    matrix: jax.Array,
    weight: jax.Array,
    out: jax.Array,
    statistics: jax.Array,
    out_grad: jax.Array,
    how: Geometry,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of ``x``, ``affine`` and ``matrix``.

    Args:
      x: ``[C, N]``.
      affine: ``[C, 2]``: gain and shift.
      matrix: ``[C, 9 O]`` of x's dtype.
      weight: ``[1, N]``.
      out: ``[O, N]``, the result of the convolution.
      statistics: ``[., O, 3]``: the mean of each block, what the gradient of each of its values
        gets by the mean, and what it gets for its distance from the mean.
      out_grad: ``[O, N]``.
      how: The geometry.
    """
    (channels, length), outputs = x.shape, out.shape[0]
    return pl.pallas_call(
        functools.partial(_gradient_kernel, how=how),
        grid=(length // how.block,),
        in_specs=[
            *_inputs(x, matrix, how),
            _columns(outputs, how),
            _of_block(outputs, 3),
            _columns(outputs, how),
        ],
        out_specs=[_columns(channels, how), _whole(channels, 2), _whole(*matrix.shape)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(affine.shape, jnp.float32),
            jax.ShapeDtypeStruct(matrix.shape, jnp.float32),
        ],
    )(x, affine, matrix, weight, out, statistics, out_grad)


def _value_kernel(x, affine, matrix, weight, out, statistics, *, how):
    active = _scaled(x[...], affine[...])
    active = jnp.maximum(active, 0) if how.relu else active
    value = _product(matrix[...], _shifted(active, how, 1).astype(x.dtype), how).astype(out.dtype)
    out[...] = value
    value, weights = value.astype(jnp.float32), weight[...]
    mean = jnp.sum(value * weights, axis=1, keepdims=True) / jnp.maximum(jnp.sum(weights), 1)
    squares = jnp.sum(jnp.square(value - mean) * weights, axis=1, keepdims=True)
    statistics[...] = jnp.concatenate([mean, squares], axis=1)


def _gradient_kernel(
    x, affine, matrix, weight, out, statistics, out_grad, x_grad, affine_grad, matrix_grad, *, how
):
    @pl.when(pl.program_id(0) == 0)
    def _():
        affine_grad[...] = jnp.zeros(affine_grad.shape, affine_grad.dtype)
        matrix_grad[...] = jnp.zeros(matrix_grad.shape, matrix_grad.dtype)

    mean, by_mean, by_squares = (statistics[:, i : i + 1] for i in range(3))
    through = by_mean + by_squares * (out[...].astype(jnp.float32) - mean)
    grad = out_grad[...].astype(jnp.float32) + weight[...] * through
    shifted = _shifted(grad, how, -1).astype(x.dtype)
    before = x[...].astype(jnp.float32)
    active = _scaled(before, affine[...])
    grad = _product(matrix[...], shifted, how)
    if how.relu:
        active, grad = jnp.maximum(active, 0), jnp.where(active > 0, grad, 0)
    matrix_grad[...] += _product(active.astype(x.dtype), shifted, how, transposed=True)
    x_grad[...] = (grad * affine[:, 0:1]).astype(x_grad.dtype)
    gain_grad = jnp.sum(grad * before, axis=1, keepdims=True)
    affine_grad[...] += jnp.concatenate([gain_grad, jnp.sum(grad, axis=1, keepdims=True)], axis=1)


def _scaled(x: jax.Array, affine: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) * affine[:, 0:1] + affine[:, 1:2]


def _shifted(x: jax.Array, how: Geometry, sign: int) -> jax.Array:
    """Returns ``[9 C, N]``: for each offset ``q``, x moved by ``sign * q``, 0 beyond an image."""
    place = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    column = lax.rem(place, jnp.int32(how.width))
    row = lax.rem(lax.div(place, jnp.int32(how.width)), jnp.int32(how.height))
    copies = []
    for down, right in itertools.product((-sign, 0, sign), repeat=2):
        by = -(down * how.width + right) % x.shape[1]
        moved = pltpu.roll(x, by, 1) if by else x
        vertical = (row + down >= 0) & (row + down < how.height)
        horizontal = (column + right >= 0) & (column + right < how.width)
        copies.append(jnp.where(vertical & horizontal, moved, 0))
    return jnp.concatenate(copies, axis=0)


def _product(a: jax.Array, b: jax.Array, how: Geometry, *, transposed: bool = False) -> jax.Array:
    """Returns ``a @ b``, or ``a @ b.T``, in float32."""
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(
        a, b, contracted, precision=how.precision, preferred_element_type=jnp.float32
    )


def _inputs(x: jax.Array, matrix: jax.Array, how: Geometry) -> list[pl.BlockSpec]:
    """Describes the first four arrays of a kernel: ``x, affine, matrix, weight``."""
    channels = x.shape[0]
    return [
        _columns(channels, how),
        _whole(channels, 2),
        _whole(*matrix.shape),
        _columns(1, how),
    ]


def _columns(rows: int, how: Geometry) -> pl.BlockSpec:
    """Describes the block of columns that a step of the grid handles."""
    return pl.BlockSpec((rows, how.block), lambda i: (0, i))


def _whole(*shape: int) -> pl.BlockSpec:
    """Describes an array that every step of the grid sees, or adds to, as a whole."""
    return pl.BlockSpec(shape, lambda i: (0, 0))


def _of_block(*shape: int) -> pl.BlockSpec:
    """Describes the entry of a stack, one for each step of the grid."""
    return pl.BlockSpec((None, *shape), lambda i: (i, 0, 0))
