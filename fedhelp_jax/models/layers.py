"""Provides Flax layers on channels-first activations, with PyTorch's conventions."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedhelp_jax.models.conv import conv, conv_transpose
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.typing import PyTree

# Like torch.nn.init.kaiming_normal_(mode="fan_in"), as in the CIFAR ResNets of the literature.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

# Name of the submodules whose variables are stacked on a leading axis, with one entry per block.
STACKED = "rest"


class Conv(nn.Module):
    """A ``size``-wide convolution, padded by ``size // 2``."""

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer."""
        shape = (self.size,) * (x.ndim - 2) + (x.shape[0], self.features)
        x = conv(x, self.param("kernel", he_normal, shape), self.stride)
        if not self.use_bias:
            return x
        return _add(x, self.param("bias", nn.initializers.zeros, (self.features,)))


class ConvKernel(nn.Module):
    """The kernel ``[3, 3, C_in, C_out]`` of a `Conv` that is computed elsewhere."""

    features: int

    @nn.compact
    def __call__(self, channels: int) -> jax.Array:
        """Returns the kernel."""
        return self.param("kernel", he_normal, (3, 3, channels, self.features))


class ConvTranspose(nn.Module):
    """A transposed convolution with a bias that maps each input to a block of side ``size``."""

    features: int
    size: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer."""
        shape = (self.size,) * (x.ndim - 2) + (x.shape[0], self.features)
        x = conv_transpose(x, self.param("kernel", he_normal, shape))
        return _add(x, self.param("bias", nn.initializers.zeros, (self.features,)))


class BatchNorm(nn.Module):
    """Batch normalisation over ``[C, B, *spatial]`` as PyTorch defines it.

    A batch is normalised by its biased variance, while the running variance uses the unbiased one
    (``n / (n - 1)``), with ``running = 0.9 * running + 0.1 * batch`` and an eps of 1e-5.
    ``flax.linen.BatchNorm`` differs in the first two points, so it is not used here.

    Statistics are over the examples where ``mask`` is true; a batch without any leaves the running
    statistics unchanged. The layer computes in the parameters' dtype and returns that of ``x``.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None) -> jax.Array:
        """Applies the layer."""
        scale, bias, running = self._variables(x.shape[0])
        dtype, x = x.dtype, x.astype(scale.dtype)
        if not train:
            gain, shift = self._folded(scale, bias, running[0].value, running[1].value)
            return (x * _per_channel(gain, x) + _per_channel(shift, x)).astype(dtype)
        if mask is None:
            mask = jnp.ones(x.shape[1], bool)
        normalized, mean, var = normalize(x, mask, self.epsilon)
        self._update(running, mean, var, jnp.sum(mask) * x[0, 0].size)
        return (normalized * _per_channel(scale, x) + _per_channel(bias, x)).astype(dtype)

    def _variables(self, channels: int) -> tuple[jax.Array, jax.Array, tuple[Any, Any]]:
        """Returns the scale, the bias, and the running mean and variance."""
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        return scale, bias, (mean, self.variable("batch_stats", "var", jnp.ones, (channels,)))

    def _folded(
        self, scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns gain and shift, so that the layer is ``gain * x + shift``."""
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        return gain, bias - mean * gain

    def _update(
        self, running: tuple[Any, Any], mean: jax.Array, var: jax.Array, count: jax.Array
    ) -> None:
        """Moves the running statistics towards those of a batch of so many values."""
        if self.is_initializing():
            return
        step = jnp.where(count > 0, 1 - self.momentum, 0).astype(mean.dtype)
        unbiased = var * (count / jnp.maximum(count - 1, 1)).astype(mean.dtype)
        for variable, new in zip(running, (mean, unbiased), strict=True):
            variable.value += step * (new - variable.value)


class FoldedBatchNorm(BatchNorm):
    """Batch normalisation in training whose input is scaled, and was measured, elsewhere.

    It has the variables of `BatchNorm`. Called with the statistics of its input, it returns gain
    and shift ``[C]``, so that the normalised input is ``gain * x + shift``.
    """

    @nn.compact
    def __call__(self, mean: jax.Array, var: jax.Array, count: jax.Array) -> PyTree:
        """Applies the layer."""
        scale, bias, running = self._variables(mean.shape[0])
        self._update(running, *map(jax.lax.stop_gradient, (mean, var, count)))
        # Without examples the variance is 0; a factor of 1/sqrt(eps) per layer would then overflow.
        return self._folded(scale, bias, mean, jnp.where(count > 0, var, 1))


class GroupNorm(nn.Module):
    """Group normalisation over ``[C, B, *spatial]`` as in ``torch.nn.GroupNorm``.

    Every example is normalised separately, in ``groups`` groups of channels, or in groups of one if
    there are fewer channels. The layer computes in the parameters' dtype and returns that of ``x``.
    """

    groups: int = 8
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer."""
        channels = x.shape[0]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        dtype, x = x.dtype, x.astype(scale.dtype)
        grouped = x.reshape(min(self.groups, channels), -1, *x.shape[1:])
        axes = (1, *range(3, grouped.ndim))
        centred = grouped - jnp.mean(grouped, axis=axes, keepdims=True)
        var = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
        normalized = (centred * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        return (normalized * _per_channel(scale, x) + _per_channel(bias, x)).astype(dtype)


def normalize(
    x: jax.Array, mask: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``(x - mean) / sqrt(var + epsilon)`` per channel.

    The mean and the variance are over the examples where ``mask`` is true. The gradient is written
    by hand. It takes two reductions instead of the many that autodiff makes of the mean and the
    variance, so it runs faster and takes half as long to compile. No gradient flows through the
    returned mean and variance, which only feed running statistics.

    Args:
      x: ``[C, B, *spatial]``.
      mask: ``[B]`` boolean.
      epsilon: Added to the variance.

    Returns:
      ``(normalized, mean [C], biased variance [C])``.
    """
    normalized, mean, var = cast(PyTree, _normalize(x, mask, epsilon))
    return normalized, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalize(x: jax.Array, mask: jax.Array, epsilon: float) -> PyTree:
    return _normalize_forward(x, mask, epsilon)[0]


def _normalize_forward(x, mask, epsilon):
    weight, total = _weights(x, mask)
    mean = _channel_sum(x * weight) / total
    centred = x - _per_channel(mean, x)
    var = _channel_sum(jnp.square(centred) * weight) / total
    # Without examples the variance is 0; a factor of 1/sqrt(eps) per layer would then overflow.
    inverse = jax.lax.rsqrt(jnp.where(mask.any(), var, 1) + epsilon)
    normalized = centred * _per_channel(inverse, x)
    return (normalized, mean, var), (normalized, inverse, mask)


def _normalize_backward(epsilon, residuals, grads):
    del epsilon
    normalized, inverse, mask = residuals
    grad = grads[0]
    weight, total = _weights(normalized, mask)
    # The statistics affect every example, but only those of the mask affect the statistics.
    mean_grad = _channel_sum(grad) / total
    mean_product = _channel_sum(grad * normalized) / total
    through = _per_channel(mean_grad, grad) + normalized * _per_channel(mean_product, grad)
    return (grad - weight * through) * _per_channel(inverse, grad), None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _weights(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    weight = mask.astype(x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))
    return weight, jnp.maximum(jnp.sum(weight) * x[0, 0].size, 1)


def _channel_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _add(x: jax.Array, bias: jax.Array) -> jax.Array:
    # Added in the bias's dtype, in which its gradient is then also summed.
    return (x + _per_channel(bias, x)).astype(x.dtype)


def _per_channel(values: jax.Array, x: jax.Array) -> jax.Array:
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def draw_variables(key: jax.Array, shapes: PyTree) -> PyTree:
    """Initialises a network: He-normal kernels, unit scales and variances, the rest zero.

    All kernels are cut from one draw of normals, because the layers' own initialisers, with a draw
    each, take longer to compile than the training step.

    Args:
      key: The key of the draw.
      shapes: The variables' shapes, from ``jax.eval_shape`` of a Flax ``init``. A kernel's axes are
        ``[*spatial, in, out]``, after the leading axis of stacked blocks.

    Returns:
      Arrays of those shapes.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    kinds = [path[-1].key for path, _ in leaves]
    sizes = [
        leaf.size if kind == "kernel" else 0 for kind, (_, leaf) in zip(kinds, leaves, strict=True)
    ]
    normals = jax.random.normal(key, (sum(sizes),))
    values, start = [], 0
    for kind, size, (path, leaf) in zip(kinds, sizes, leaves, strict=True):
        if kind == "kernel":
            stacked = any(entry.key == STACKED for entry in path)
            fan_in = math.prod(leaf.shape[1 if stacked else 0 : -1])
            values.append(normals[start : start + size].reshape(leaf.shape) * (2 / fan_in) ** 0.5)
            start += size
        else:
            values.append(
                jnp.full(leaf.shape, 1.0 if kind in ("scale", "var") else 0.0, leaf.dtype)
            )
    return jax.tree.unflatten(structure, values)


def init_linear(key: jax.Array, width: int, num_classes: int) -> Variables:
    """Initialises a linear head: a He-normal kernel ``[D, C]`` and a zero bias ``[C]``."""
    return {"kernel": he_normal(key, (width, num_classes)), "bias": jnp.zeros((num_classes,))}


def linear(params: Variables, features: jax.Array) -> jax.Array:
    """Applies a linear head, ``[*B, D] -> [*B, C]``; on maps, it is a convolution of size one."""
    return features @ params["kernel"] + params["bias"]


def linen_model(network: Callable[[bool], nn.Module], width: int, num_classes: int) -> Model:
    """Returns a :class:`Model` of a Flax Linen module and a linear head.

    Its weights come from `draw_variables`.

    Args:
      network: ``train -> module``. The module is called with images ``[B, *spatial, channels]`` and
        a mask ``[B]`` or None, and returns features ``[..., width]``. Its batch statistics, if any,
        are in the collection ``batch_stats``.
      width: ``D`` of the features.
      num_classes: ``C`` of the head.
    """

    def init(key: jax.Array, sample_shape: tuple[int, ...]) -> Variables:
        features_key, head_key = jax.random.split(key)
        shapes = jax.eval_shape(network(False).init, features_key, jnp.zeros((1, *sample_shape)))
        variables = draw_variables(features_key, shapes)
        head = init_linear(head_key, width, num_classes)
        return {
            "params": {"features": variables["params"], "head": head},
            "batch_stats": variables.get("batch_stats", {}),
        }

    def features(
        variables: Variables, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> PyTree:
        stats = variables["batch_stats"]
        collections = {"params": variables["params"]["features"], "batch_stats": stats}
        if not train:
            return network(train).apply(collections, x, mask), stats
        out, updated = network(train).apply(collections, x, mask, mutable=["batch_stats"])
        return out, updated.get("batch_stats", stats)

    return Model(init, features, linear)
