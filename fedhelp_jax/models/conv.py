"""Implements convolutions, in the form that suits the platform that a program is compiled for.

Activations are channels first, ``[C, B, *spatial]``, of any spatial rank. Accelerators get XLA's
own convolutions. CPUs get products of matrices (`conv_cpu`), since XLA's CPU back end is tens of
times slower at a convolution in a loop. ``lax.platform_dependent`` chooses between them when a
program is lowered, so that one compiled ahead of time, for a device that the machine does not have,
gets the device's form. ``docs/performance.md`` says what each form was measured or counted to cost.
"""

import functools
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from fedhelp_jax.core.compilation import traced_once
from fedhelp_jax.models import conv_cpu


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int | None = None) -> jax.Array:
    """Computes a cross-correlation without bias.

    ``out[o, b, p] = sum_{c, q} kernel[q, c, o] * x[c, b, stride * p + q - padding]``

    The value and both gradients equal those of ``lax.conv_general_dilated`` with that padding, up
    to rounding. Products are computed in x's dtype, to which the kernel is cast, and on CPUs in
    float32 or wider; sums are in float32 or wider. With bfloat16 activations and a float32 kernel,
    the values and the gradient with respect to ``x`` are therefore rounded once, at the end, and
    the kernel's gradient is never rounded. ``jax.default_matmul_precision`` applies to the
    gradients too.

    Args:
      x: ``[C_in, B, *spatial]`` activations, any number of spatial axes.
      kernel: ``[*(k,) * rank, C_in, C_out]``, ``k`` odd.
      stride: Step between outputs, the same along every axis.
      padding: Zeros on every side, at most ``k - 1``; ``k // 2`` ("same") if None.

    Returns:
      ``[C_out, B, *out]`` of x's dtype with ``out = (spatial + 2 padding - k) // stride + 1``,
      which is ``ceil(spatial / stride)`` for "same".
    """
    padding = kernel.shape[0] // 2 if padding is None else padding
    return _conv(x, kernel, stride, padding, context_precision())


def context_precision() -> Any:
    """Returns the precision of the context, which is left before gradients are traced."""
    # JAX declares its options while it runs, where a type checker does not see them.
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def _value_by_platform(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int, precision: Any
) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(conv_cpu.value, stride=stride, padding=padding),
        default=functools.partial(_value, stride=stride, padding=padding, precision=precision),
    )


def _gradients_by_platform(
    x: jax.Array, kernel: jax.Array, out_grad: jax.Array, stride: int, padding: int, precision: Any
) -> tuple[jax.Array, jax.Array]:
    return lax.platform_dependent(
        x,
        kernel,
        out_grad,
        cpu=functools.partial(conv_cpu.gradients, stride=stride, padding=padding),
        default=functools.partial(_gradients, stride=stride, padding=padding, precision=precision),
    )


# Networks repeat layers of the same shape.
_traced_value = traced_once(_value_by_platform, 2, 3, 4)
_traced_gradients = traced_once(_gradients_by_platform, 3, 4, 5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: jax.Array, kernel: jax.Array, stride: int, padding: int, precision: Any) -> jax.Array:
    return _traced_value(x, kernel, stride, padding, precision)


def _conv_forward(x, kernel, stride, padding, precision):
    return _conv(x, kernel, stride, padding, precision), (x, kernel)


def _conv_backward(stride, padding, precision, residuals, out_grad):
    x, kernel = residuals
    x_grad, kernel_grad = _traced_gradients(x, kernel, out_grad, stride, padding, precision)
    return x_grad, kernel_grad.astype(kernel.dtype)


_conv.defvjp(_conv_forward, _conv_backward)


def _value(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int, precision: Any = None
) -> jax.Array:
    """Returns the convolution as accelerators compute it."""
    rank = x.ndim - 2
    images = _images(rank)
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride,) * rank,
        [(padding, padding)] * rank,
        dimension_numbers=lax.ConvDimensionNumbers(images, (rank + 1, rank, *range(rank)), images),
        precision=precision,
    )


def _gradients(
    x: jax.Array,
    kernel: jax.Array,
    out_grad: jax.Array,
    stride: int,
    padding: int,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns both gradients as accelerators compute them, the kernel's in float32 or wider.

    They are written as convolutions because autodiff would round the kernel's gradient to x's
    dtype.
    """
    rank, size = x.ndim - 2, kernel.shape[0]
    images, places = _images(rank), range(rank)
    extents = [stride * (n - 1) + 1 for n in out_grad.shape[2:]]
    lengths = list(zip(x.shape[2:], extents, strict=True))
    # An input gathers the gradients of the outputs whose windows it is in. Between these lie zeros
    # if there is a stride.
    x_grad = lax.conv_general_dilated(
        out_grad,
        jnp.flip(kernel, places).astype(x.dtype),
        (1,) * rank,
        [(size - 1 - padding, n - extent + padding) for n, extent in lengths],
        lhs_dilation=(stride,) * rank,
        dimension_numbers=lax.ConvDimensionNumbers(images, (rank, rank + 1, *places), images),
        precision=precision,
    )
    # An entry of the kernel is a sum over images, which therefore have the part of input channels.
    kernel_grad = lax.conv_general_dilated(
        x,
        out_grad,
        (1,) * rank,
        [(padding, size - 1 - n + extent - padding) for n, extent in lengths],
        rhs_dilation=(stride,) * rank,
        dimension_numbers=lax.ConvDimensionNumbers(
            range(rank + 2), range(rank + 2), (rank, rank + 1, *places)
        ),
        precision=precision,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return x_grad, kernel_grad


def _images(rank: int) -> tuple[int, ...]:
    """Returns where images, channels and places are in ``[C, B, *spatial]``."""
    return (1, 0, *range(2, 2 + rank))


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
    blocks = cast(jax.Array, _product(matrix, x.reshape(x.shape[0], -1), context_precision()))
    return _from_blocks(blocks.reshape(*(size,) * rank, kernel.shape[-1], *x.shape[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(matrix: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    """Returns ``matrix @ x``; autodiff would round the matrix's gradient to x's dtype."""
    return _dot(matrix.astype(x.dtype), x, precision).astype(x.dtype)


def _product_forward(matrix, x, precision):
    return _product(matrix, x, precision), (matrix, x)


def _product_backward(precision, residuals, out_grad):
    matrix, x = residuals
    x_grad = _dot(matrix.T.astype(x.dtype), out_grad, precision).astype(x.dtype)
    return _dot(out_grad, x.T, precision).astype(matrix.dtype), x_grad


_product.defvjp(_product_forward, _product_backward)


def _dot(a: jax.Array, b: jax.Array, precision: Any) -> jax.Array:
    """Multiplies two matrices with sums, and a result, in float32 or wider."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return a.astype(dtype) @ b.astype(dtype)

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=precision, preferred_element_type=dtype)

    return lax.platform_dependent(a, b, cpu=widened, default=narrow)


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
