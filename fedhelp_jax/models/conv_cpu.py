"""Implements convolutions on CPU: shifted copies, a matrix product, sums of shifted results.

XLA's CPU back end runs any convolution inside a loop, and any grouped one, with naive code, and a
round of federated learning consists of such loops (``docs/performance.md`` has the times). Here a
convolution, which is linear in its input and in its kernel, is computed as

    out = combine(matrix(kernel) @ spread(x))

with three linear maps. Both gradients are products with the transposes of these maps.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedhelp_jax.core.tree import zeros_of
from fedhelp_jax.typing import PyTree

# Images are computed together if what is multiplied and the product take at most _TOGETHER_BYTES.
# Otherwise they are computed in parts of at most _TILE_BYTES, which stay in a core's cache. Parts
# run faster, but they are a loop, which takes longer to compile.
_TOGETHER_BYTES, _TILE_BYTES = 2**21, 2**20
# A single image that takes more than this is computed one offset of the kernel at a time.
_MOST_BYTES = 2**28
# The matrix of a kernel of more bytes is made when it is needed, and again for the gradients. XLA
# would otherwise make those of all layers at the start, from the parameters, and keep them.
_KEPT_BYTES = 2**20


class _Plan(NamedTuple):
    """How a convolution is computed.

    Attributes:
      size: The kernel's size along each axis.
      stride: Step between outputs.
      padding: Zeros on every side.
      spatial: Lengths of the input's axes.
      out: Lengths of the output's axes.
      pairs: Whether pairs of outputs along the first axis share products.
      before: How many axes are shifted before the product, where each offset adds rows to what is
        multiplied. The others are shifted after it, where each offset adds rows to the product.
    """

    size: int
    stride: int
    padding: int
    spatial: tuple[int, ...]
    out: tuple[int, ...]
    pairs: bool
    before: int

    def numbers(self, c_in: int, c_out: int) -> int:
        """Returns how many numbers an image has in what is multiplied and in the product."""
        places = math.prod(self.out[1 : self.before]) * math.prod(self.spatial[self.before :])
        inputs = self.size ** (self.before - 1) * c_in
        outputs = self.size ** (len(self.out) - self.before) * c_out
        if self.pairs:
            return 4 * _half(self.out[0]) * places * (inputs + outputs)
        return self.out[0] * places * (self.size * inputs + outputs)


def _make_plan(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> _Plan:
    """Returns the plan that reads and writes the fewest numbers."""
    size, spatial = kernel.shape[0], x.shape[2:]
    out = tuple((n + 2 * padding - size) // stride + 1 for n in spatial)

    def best(pairs: bool) -> _Plan:
        plans = [
            _Plan(size, stride, padding, spatial, out, pairs, before)
            for before in range(1, len(out) + 1)
        ]
        return min(plans, key=lambda plan: plan.numbers(*kernel.shape[-2:]))

    if size != 3 or stride != 1 or out[0] == 1:
        return best(pairs=False)
    paired = best(pairs=True)
    # Bringing the kernel into the form of pairs costs more than they save if it is the larger.
    larger = kernel.size > x.shape[1] * paired.numbers(*kernel.shape[-2:])
    return best(pairs=False) if larger else paired


def value(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Returns what `fedhelp_jax.models.conv.conv` returns."""
    dtype = x.dtype
    x, kernel = _widened(x, kernel.astype(dtype))
    x, kernel = _made_when_needed(x, kernel)
    plan = _make_plan(x, kernel, stride, padding)
    compute = _value if _fits(plan, kernel) else _value_by_offset
    out, _ = _over_images(plan, kernel, lambda x: (compute(plan, x, kernel), ()), x)
    return out.astype(dtype)


def gradients(
    x: jax.Array, kernel: jax.Array, out_grad: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients with respect to x, of its dtype, and to the kernel, not narrowed."""
    dtype = x.dtype
    x, kernel, out_grad = _widened(x, kernel.astype(dtype), out_grad)
    out_grad, kernel = _made_when_needed(out_grad, kernel)
    plan = _make_plan(x, kernel, stride, padding)
    compute = _gradients if _fits(plan, kernel) else _gradients_by_offset
    x_grad, kernel_grad = _over_images(
        plan, kernel, lambda x, grad: compute(plan, x, kernel, grad), x, out_grad
    )
    return x_grad.astype(dtype), kernel_grad


def _made_when_needed(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both; what is made from a large kernel is not made before x is there."""
    return lax.optimization_barrier((x, kernel)) if kernel.nbytes > _KEPT_BYTES else (x, kernel)


def _widened(*arrays: jax.Array) -> list[jax.Array]:
    """Returns the arrays in float32, if they are narrower.

    The results are the same up to float32 rounding. XLA's CPU back end casts around most operations
    on bfloat16.
    """
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]


def _image_bytes(plan: _Plan, kernel: jax.Array) -> int:
    return plan.numbers(*kernel.shape[-2:]) * kernel.dtype.itemsize


def _fits(plan: _Plan, kernel: jax.Array) -> bool:
    return _image_bytes(plan, kernel) <= _MOST_BYTES


def _over_images(
    plan: _Plan, kernel: jax.Array, fn: Callable[..., tuple[PyTree, PyTree]], *arrays: jax.Array
) -> tuple[PyTree, PyTree]:
    """Computes ``fn(*arrays)``, in parts of the batch if needed.

    Args:
      plan: How the convolution is computed.
      kernel: The kernel.
      fn: Returns ``(result [C, B, ...], terms that are summed over images)``.
      *arrays: ``[C, B, *spatial]``.
    """
    batch, image = arrays[0].shape[1], _image_bytes(plan, kernel)
    if batch == 1 or batch * image <= _TOGETHER_BYTES:
        return fn(*arrays)
    most = max(1, _TILE_BYTES // image)
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)

    def add(sums: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        result, more = fn(*part)
        return jax.tree.map(jnp.add, sums, more), result

    parts = [jnp.moveaxis(x.reshape(len(x), -1, images, *x.shape[2:]), 1, 0) for x in arrays]
    begun = zeros_of(jax.eval_shape(fn, *(part[0] for part in parts))[1])
    sums, results = lax.scan(add, begun, parts)
    results = jnp.moveaxis(results, 0, 1)
    return results.reshape(len(results), batch, *results.shape[3:]), sums


def _value(plan: _Plan, x: jax.Array, kernel: jax.Array) -> jax.Array:
    results = _dot(_matrix(plan, kernel), _spread(plan, x))
    return _combine(plan, results, kernel.shape[-1], x.shape[1])


def _gradients(
    plan: _Plan, x: jax.Array, kernel: jax.Array, out_grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, matrix = _spread(plan, x), _matrix(plan, kernel)
    results = jax.ShapeDtypeStruct((*matrix.shape[:2], rows.shape[2]), x.dtype)
    combine = functools.partial(_combine, plan, channels=kernel.shape[-1], batch=x.shape[1])
    (results_grad,) = jax.linear_transpose(combine, results)(out_grad)
    rows_grad = _dot(matrix.swapaxes(1, 2), results_grad)
    (x_grad,) = jax.linear_transpose(functools.partial(_spread, plan), x)(rows_grad)
    matrix_grad = _dot(results_grad, rows.swapaxes(1, 2))
    (kernel_grad,) = jax.linear_transpose(functools.partial(_matrix, plan), kernel)(matrix_grad)
    return x_grad, kernel_grad


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies ``[P, m, k]`` by ``[P, k, n]``."""
    # As a matrix if there is just one, since a product with a batch axis may take another path.
    return (a[0] @ b[0])[None] if len(a) == 1 else a @ b


# The three maps. With ``pairs``, the outputs ``y0`` and ``y1`` at neighbouring places need inputs
# d0 to d3 and kernel entries g0 to g2. Winograd's F(2, 3) takes four products instead of six:
#
#     m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2
#     m3 = (d1 - d3) g2    m2 = (d2 - d1) (g0 - g1 + g2) / 2    y0 = m0 + m1 + m2, y1 = m1 - m2 - m3
#
# (Lavin and Gray, arXiv:1509.09308). The first axis has the pairs because the others then stay
# contiguous. ``P`` is 4 with pairs, and 1 without them.


def _spread(plan: _Plan, x: jax.Array) -> jax.Array:
    """Returns what is multiplied, ``[C_in, B, *spatial] -> [P, rows, B * places]``."""
    channels, rank = len(x), len(plan.out)
    for axis in reversed(range(int(plan.pairs), plan.before)):
        # Shifted copies of shifted copies; axes are counted from the end, as offsets lie in front.
        shifted = [_shifted(plan, x, offset, axis, axis - rank) for offset in range(plan.size)]
        x = jnp.stack(shifted)
    if plan.pairs:
        tiles = _half(plan.out[0])
        d = [_every(x, i - plan.padding, 2, tiles, -rank) for i in range(4)]
        x = jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]])
    else:
        x = x[None]
    return x.reshape(len(x), plan.size ** (plan.before - plan.pairs) * channels, -1)


def _matrix(plan: _Plan, kernel: jax.Array) -> jax.Array:
    """Returns ``[*(k,) * rank, C_in, C_out] -> [P, rows of the product, rows of spread]``."""
    c_in, c_out = kernel.shape[-2:]
    rows = plan.size ** (plan.before - plan.pairs)
    if plan.pairs:
        g = kernel
        outer, middle = (g[0] + g[2]) / 2, g[1] / 2
        kernel = jnp.stack([g[0], outer + middle, outer - middle, g[2]])
    else:
        kernel = kernel[None]
    kernel = kernel.reshape(len(kernel), rows, -1, c_in, c_out)
    return kernel.transpose(0, 2, 4, 1, 3).reshape(len(kernel), -1, rows * c_in)


def _combine(plan: _Plan, results: jax.Array, channels: int, batch: int) -> jax.Array:
    """Returns the output, ``[P, rows, B * places] -> [C_out, B, *out]``."""
    rank, before = len(plan.out), plan.before
    first = _half(plan.out[0]) if plan.pairs else plan.out[0]
    places = (first, *plan.out[1:before], *plan.spatial[before:])
    offsets = (plan.size,) * (rank - before)
    x = results.reshape(len(results), *offsets, channels, batch, *places)
    if plan.pairs:
        m = _parts(x)
        x = jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis=-rank)
        x = x.reshape(*x.shape[: -rank - 1], 2 * first, *places[1:])
        x = lax.slice_in_dim(x, 0, plan.out[0], axis=x.ndim - rank)
    else:
        x = x.reshape(x.shape[1:])
    for axis in range(before, rank):
        shifted = [_shifted(plan, part, q, axis, axis - rank) for q, part in enumerate(_parts(x))]
        x = functools.reduce(jnp.add, shifted)
    return x


def _half(length: int) -> int:
    return -(-length // 2)


def _parts(x: jax.Array) -> list[jax.Array]:
    """Returns the slices of the first axis; the transpose of a split is one concatenation."""
    return [part.reshape(x.shape[1:]) for part in jnp.split(x, len(x))]


def _shifted(plan: _Plan, x: jax.Array, offset: int, axis: int, along: int) -> jax.Array:
    """Returns what an offset of the kernel meets: ``y[i] = x[stride * i + offset - padding]``."""
    return _every(x, offset - plan.padding, plan.stride, plan.out[axis], along)


def _every(x: jax.Array, start: int, step: int, count: int, along: int) -> jax.Array:
    """Returns ``y[i] = x[start + step * i]`` for ``i < count``, with zeros outside of x."""
    along %= x.ndim
    end = start + step * (count - 1) + 1
    config = [(0, 0, 0)] * x.ndim
    config[along] = (-start, end - x.shape[along], 0)
    padded = lax.pad(x, jnp.zeros((), x.dtype), config)
    return lax.slice_in_dim(padded, 0, None, step, along)


def _value_by_offset(plan: _Plan, x: jax.Array, kernel: jax.Array) -> jax.Array:
    def add(out: jax.Array, each: PyTree) -> tuple[PyTree, PyTree]:
        offset, matrix = each
        return out + matrix.T @ _rows(plan, x, offset), ()

    zeros = jnp.zeros((kernel.shape[-1], x.shape[1] * math.prod(plan.out)), x.dtype)
    out, _ = lax.scan(add, zeros, _offsets(plan, kernel))
    return out.reshape(-1, x.shape[1], *plan.out)


def _gradients_by_offset(
    plan: _Plan, x: jax.Array, kernel: jax.Array, out_grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    columns = out_grad.reshape(len(out_grad), -1)

    def add(x_grad: jax.Array, each: PyTree) -> tuple[PyTree, PyTree]:
        offset, matrix = each
        put_back = jax.linear_transpose(lambda x: _rows(plan, x, offset), x)
        return x_grad + put_back(matrix @ columns)[0], _rows(plan, x, offset) @ columns.T

    x_grad, matrix_grads = lax.scan(add, jnp.zeros_like(x), _offsets(plan, kernel))
    return x_grad, matrix_grads.reshape(kernel.shape)


def _offsets(plan: _Plan, kernel: jax.Array) -> tuple[np.ndarray, jax.Array]:
    """Returns all offsets ``[n, rank]``, and the kernel's matrix ``[n, C_in, C_out]`` of each."""
    offsets = list(itertools.product(range(plan.size), repeat=len(plan.out)))
    return np.array(offsets), kernel.reshape(len(offsets), *kernel.shape[-2:])


def _rows(plan: _Plan, x: jax.Array, offset: jax.Array) -> jax.Array:
    """Returns what one offset of the kernel meets, ``[C_in, B * out]``."""
    x = jnp.pad(x, [(0, 0), (0, 0)] + [(plan.padding, plan.padding)] * len(plan.out))
    for axis, length in enumerate(plan.out):
        extent = plan.stride * (length - 1) + 1
        x = lax.dynamic_slice_in_dim(x, offset[axis], extent, 2 + axis)
        x = lax.slice_in_dim(x, 0, None, plan.stride, 2 + axis)
    return x.reshape(len(x), -1)
