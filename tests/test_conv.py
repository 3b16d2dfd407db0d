"""Convolutions and pooling, in the CPU's form and the accelerators', against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from fedhelp_jax.core.compilation import jit
from fedhelp_jax.models import conv as convolutions
from fedhelp_jax.models import conv_cpu
from fedhelp_jax.models.conv import conv, conv_transpose, max_pool

CPU = conv_cpu.value, conv_cpu.gradients
ACCELERATOR = convolutions._value, convolutions._gradients


def xla_conv(x, kernel, stride, padding):
    """The same correlation by XLA, on our channels-first layout."""
    rank = x.ndim - 2
    letters = "DHW"[-rank:]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,) * rank,
        padding=[(padding, padding)] * rank,
        dimension_numbers=("CN" + letters, letters + "IO", "CN" + letters),
    )


CASES = [
    ((9,), 3, 2),
    ((6,), 3, 1),
    ((8, 8), 1, 2),
    ((8, 8), 3, 1),
    ((1, 4), 3, 1),
    ((8, 8), 3, 2),
    ((7, 10), 3, 1),
    ((7, 10), 5, 3),
    ((7, 10), 5, 1),
    ((5, 6, 4), 1, 1),
    ((5, 6, 4), 3, 1),
    ((5, 6, 4), 3, 2),
]


def arrays(spatial, size, stride, padding, channels=3, dtype=float):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (channels, 2, *spatial), dtype)
    kernel = jax.random.normal(keys[1], (*(size,) * len(spatial), channels, 4), dtype)
    out = jax.eval_shape(functools.partial(xla_conv, stride=stride, padding=padding), x, kernel)
    return x, kernel, jax.random.normal(keys[2], out.shape, dtype)


# All at once, an image after the other, an offset of the kernel after the other.
@pytest.mark.slow
@pytest.mark.parametrize(("tile_bytes", "most_bytes"), [(2**20, 2**28), (1, 2**28), (1, 1)])
@pytest.mark.parametrize("channels", [1, 6])  # the fewer, the more axes are shifted before
@pytest.mark.parametrize(("spatial", "size", "stride"), CASES)
def test_the_form_of_cpus_equals_xla_in_value_and_both_gradients(
    spatial, size, stride, channels, tile_bytes, most_bytes, monkeypatch, float64
):
    monkeypatch.setattr(conv_cpu, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(conv_cpu, "_TOGETHER_BYTES", tile_bytes)
    monkeypatch.setattr(conv_cpu, "_MOST_BYTES", most_bytes)
    check(CPU, spatial, size, stride, size // 2, channels)


@pytest.mark.parametrize(("spatial", "size", "stride"), CASES)
def test_the_form_of_accelerators_equals_xla_in_value_and_both_gradients(
    spatial, size, stride, float64
):
    check(ACCELERATOR, spatial, size, stride, size // 2, 3)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", [CPU, ACCELERATOR], ids=["cpu", "accelerator"])
def test_another_padding(form, stride, padding, float64):
    check(form, (7, 6), 3, stride, padding, 3)


def check(form, spatial, size, stride, padding, channels):
    value, gradients = form
    x, kernel, grad = arrays(spatial, size, stride, padding, channels)
    reference = jax.jit(functools.partial(xla_conv, stride=stride, padding=padding))
    expected, pull = jax.vjp(reference, x, kernel)
    out = jax.jit(value, static_argnums=(2, 3))(x, kernel, stride, padding)
    np.testing.assert_allclose(out, expected, atol=1e-10)
    got = jax.jit(gradients, static_argnums=(3, 4))(x, kernel, grad, stride, padding)
    for ours, theirs in zip(got, pull(grad), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize(("tile_bytes", "images"), [(2**20, 6), (20_000, 3), (10_000, 1), (1, 1)])
def test_no_more_images_are_computed_together_than_fit(tile_bytes, images, monkeypatch):
    monkeypatch.setattr(conv_cpu, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(conv_cpu, "_TOGETHER_BYTES", tile_bytes)
    x, kernel = jnp.zeros((3, 6, 8, 8)), jnp.zeros((3, 3, 3, 4))
    plan = conv_cpu._make_plan(x, kernel, 1, 1)
    assert conv_cpu._image_bytes(plan, kernel) == 4 * (4 * 4 * 8) * (3 * 3 + 4)
    seen = []
    conv_cpu._over_images(plan, kernel, lambda x: (seen.append(x.shape[1]) or x, ()), x)
    assert set(seen) == {images}


def test_a_kernel_that_is_larger_than_the_images_is_not_brought_into_the_form_of_pairs(float64):
    kernel = jnp.zeros((3, 3, 6, 4))
    assert not conv_cpu._make_plan(jnp.zeros((6, 1, 2, 1)), kernel, 1, 1).pairs
    assert conv_cpu._make_plan(jnp.zeros((6, 8, 8, 8)), kernel, 1, 1).pairs
    check(CPU, (2, 1), 3, 1, 1, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("pixels", "pairs"), [(8, True), (4, False)])
def test_the_matrices_of_large_kernels_are_not_kept(pixels, pairs):
    """A deep network needs room for those of one layer, not for those of all layers at once."""
    channels = 256
    x = jax.ShapeDtypeStruct((channels, 8, pixels, pixels), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32)
    assert conv_cpu._make_plan(x, kernel, 1, 1).pairs == pairs

    def loss(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(conv(x, kernel))
        return x.sum()

    def temporaries(layers):
        compiled = jit(jax.grad(loss)).lower([kernel] * layers, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = kernel.size * 4 * (4 / 3 if pairs else 1)
    assert (temporaries(8) - temporaries(4)) / 4 < one / 2


def test_conv_is_the_form_of_the_platform_that_it_is_lowered_for():
    """For a platform that this machine need not have."""
    x, kernel, grad = arrays((6, 6), 3, 1, 1, dtype=np.float32)

    def both(x, kernel, grad):
        out, pull = jax.vjp(conv, x, kernel)
        return out, *pull(grad)

    def convolutions_in(platform):
        lowered = export.export(jax.jit(both), platforms=[platform])(x, kernel, grad)
        text = lowered.mlir_module()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert convolutions_in("cpu") == (0, 3)
    assert convolutions_in("cuda") == convolutions_in("tpu") == (3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("most_bytes", [2**28, 1])
def test_conv_over_stacked_clients_equals_one_by_one(stride, most_bytes, monkeypatch, float64):
    monkeypatch.setattr(conv_cpu, "_TOGETHER_BYTES", 1)
    monkeypatch.setattr(conv_cpu, "_MOST_BYTES", most_bytes)
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 4, 3, 5))
    kernels = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 2, 4))

    def both(x, kernel):
        out, pull = jax.vjp(lambda x, k: conv(x, k, stride), x, kernel)
        return out, *pull(jnp.sin(out))

    together = jax.vmap(both)(x, kernels)
    for i in range(3):
        for all_clients, alone in zip(together, both(x[i], kernels[i]), strict=True):
            np.testing.assert_allclose(all_clients[i], alone, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("spatial", "size"), [((5,), 3), ((4, 3), 2), ((2, 3, 4), 2), ((2, 1), 3)])
def test_conv_transpose_equals_xla_in_value_and_both_gradients(spatial, size):
    rank = len(spatial)
    letters = "DHW"[-rank:]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 2, *spatial))
    kernel = jax.random.normal(keys[1], (*(size,) * rank, 3, 4))

    def xla(x, kernel):
        flipped = jnp.flip(kernel, tuple(range(rank)))
        numbers = ("CN" + letters, letters + "IO", "CN" + letters)
        return lax.conv_transpose(x, flipped, (size,) * rank, "VALID", dimension_numbers=numbers)

    ours, pull = jax.vjp(conv_transpose, x, kernel)
    theirs, reference_pull = jax.vjp(xla, x, kernel)
    cotangent = jax.random.normal(keys[2], theirs.shape)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(pull(cotangent), reference_pull(cotangent), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spatial", [(6,), (4, 6), (4, 2, 6)])
def test_max_pool_equals_a_window_of_xla(spatial):
    x = jax.random.normal(jax.random.key(0), (3, 2, *spatial))
    window = (1, 1, *(2,) * len(spatial))
    ours, pull = jax.vjp(max_pool, x)
    theirs, reference_pull = jax.vjp(
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID"), x
    )
    np.testing.assert_array_equal(ours, theirs)
    cotangent = jax.random.normal(jax.random.key(1), ours.shape)
    np.testing.assert_array_equal(pull(cotangent)[0], reference_pull(cotangent)[0])


def test_max_pool_gives_its_gradient_to_the_first_of_equals_and_keeps_nan():
    x = jnp.array([[[1.0, 1.0], [0.0, 1.0]], [[0.0, 2.0], [2.0, 0.0]]])[None]
    grad = jax.grad(lambda x: jnp.sum(max_pool(x)))(x)
    np.testing.assert_array_equal(grad, [[[[1, 0], [0, 0]], [[0, 1], [0, 0]]]])
    for place in range(4):
        assert jnp.isnan(
            max_pool(x.reshape(-1, 4).at[0, place].set(jnp.nan).reshape(x.shape))[0, 0]
        )


ONCE = 1.01 * 2**-8  # what rounding to bfloat16 changes, relatively; twice may change more


def positive(seed, shape):
    """Numbers about 1 that bfloat16 holds: of these, sums in bfloat16 stand still at 256."""
    x = np.random.default_rng(seed).uniform(0.5, 1.5, shape)
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def values_in_bfloat16(fn, x, kernel, grad):
    """Value and both gradients, of bfloat16 activations and float32 parameters."""

    @jax.jit
    def run(x, kernel, grad):
        out, pull = jax.vjp(fn, x, kernel)
        return out, *pull(grad)

    x, grad = jnp.asarray(x, jnp.bfloat16), jnp.asarray(grad, jnp.bfloat16)
    return run(x, jnp.asarray(kernel, jnp.float32), grad)


def check_rounded_once(got, expected):
    """Value and x's gradient are rounded at the end, the kernel's gradient not at all."""
    assert [leaf.dtype for leaf in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for ours, reference, tolerance in zip(got, expected, (ONCE, ONCE, 1e-5), strict=True):
        np.testing.assert_allclose(np.asarray(ours, float), reference, rtol=tolerance)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(300, 4), (4, 300)])
def test_conv_in_bfloat16_sums_in_float32(channels, stride):
    side = 16 // stride
    x, kernel = positive(0, (channels[0], 2, 16, 16)), positive(1, (3, 3, *channels))
    grad = positive(2, (channels[1], 2, side, side))
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    out, padded_grad, kernel_grad = np.zeros_like(grad), np.zeros_like(padded), kernel.copy()
    for i, j in np.ndindex(3, 3):
        at = np.s_[:, :, i : i + stride * side : stride, j : j + stride * side : stride]
        out += np.einsum("co,cbhw->obhw", kernel[i, j], padded[at])
        padded_grad[at] += np.einsum("co,obhw->cbhw", kernel[i, j], grad)
        kernel_grad[i, j] = np.einsum("cbhw,obhw->co", padded[at], grad)
    got = values_in_bfloat16(lambda x, k: conv(x, k, stride), x, kernel, grad)
    check_rounded_once(got, (out, padded_grad[:, :, 1:-1, 1:-1], kernel_grad))


def test_accelerators_do_not_round_the_gradient_of_the_kernel():
    x, kernel, grad = arrays((6, 6), 3, 1, 1, dtype=jnp.bfloat16)
    gradients = functools.partial(convolutions._gradients, stride=1, padding=1)
    shapes = jax.eval_shape(gradients, x, kernel.astype(np.float32), grad)
    assert [leaf.dtype for leaf in shapes] == [jnp.bfloat16, jnp.float32]


def test_conv_transpose_in_bfloat16_sums_in_float32():
    x, kernel = positive(0, (300, 4, 9, 9)), positive(1, (2, 2, 300, 5))
    grad = positive(2, (5, 4, 18, 18))
    out, x_grad, kernel_grad = np.zeros_like(grad), np.zeros_like(x), kernel.copy()
    for i, j in np.ndindex(2, 2):
        block = grad[:, :, i::2, j::2]
        out[:, :, i::2, j::2] = np.einsum("co,cbhw->obhw", kernel[i, j], x)
        x_grad += np.einsum("co,obhw->cbhw", kernel[i, j], block)
        kernel_grad[i, j] = np.einsum("cbhw,obhw->co", x, block)
    check_rounded_once(
        values_in_bfloat16(conv_transpose, x, kernel, grad), (out, x_grad, kernel_grad)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("spatial", "size", "stride"), CASES)
def test_conv_in_bfloat16_over_stacked_clients_equals_one_by_one(spatial, size, stride):
    """Also when the activations are a transposed view."""
    x = jax.random.normal(jax.random.key(0), (2, *spatial, 5), jnp.bfloat16)
    kernels = jax.random.normal(jax.random.key(1), (3, *(size,) * len(spatial), 5, 4))

    def both(kernel, x):
        out, pull = jax.vjp(lambda x, k: conv(x, k, stride), jnp.moveaxis(x, -1, 0), kernel)
        return out, *pull(jnp.ones_like(out))

    together = jax.jit(jax.vmap(both, (0, None)))(kernels, x)
    for i in range(3):
        for ours, alone in zip(together, jax.jit(both)(kernels[i], x), strict=True):
            ours, alone = np.asarray(ours[i], float), np.asarray(alone, float)
            np.testing.assert_allclose(ours, alone, atol=2 * ONCE * np.abs(alone).max())
