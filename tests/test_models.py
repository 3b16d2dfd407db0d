"""Convolutions against XLA's, normalisation against its formula, dtypes, the shape of networks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedhelp_jax.core.compilation import compiler_options
from fedhelp_jax.models import conv as convolutions
from fedhelp_jax.models import layers
from fedhelp_jax.models.cnn import CNNS, cnn
from fedhelp_jax.models.conv import conv, conv_transpose, max_pool
from fedhelp_jax.models.model import apply_model, with_compute_dtype
from fedhelp_jax.models.resnet import RESNET_DEPTHS, resnet
from fedhelp_jax.models.unet import UNetSize, unet


def xla_conv(x, kernel, stride, pad):
    """The same correlation by XLA, on our channels-first layout."""
    rank = x.ndim - 2
    letters = "DHW"[-rank:]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,) * rank,
        padding=[(pad, pad)] * rank,
        dimension_numbers=("CN" + letters, letters + "IO", "CN" + letters),
    )


CASES = [
    ((9,), 3, 2),
    ((8, 8), 1, 2),
    ((8, 8), 3, 1),
    ((8, 8), 3, 2),
    ((7, 10), 3, 2),
    ((7, 10), 5, 3),
    ((5, 6, 4), 1, 1),
    ((5, 6, 4), 3, 1),
    ((5, 6, 4), 3, 2),
]


# Bytes of patches made at once: all offsets of a kernel, a row or plane of them, one.
@pytest.mark.slow
@pytest.mark.parametrize("patch_bytes", [2**28, 4000, 1])
@pytest.mark.parametrize("channels", [5, 3])  # as many as come out, and fewer: other gradients
@pytest.mark.parametrize(("spatial", "size", "stride"), CASES)
def test_conv_equals_xla_in_value_and_both_gradients(
    spatial, size, stride, channels, patch_bytes, monkeypatch
):
    monkeypatch.setattr(convolutions, "_PATCH_BYTES", patch_bytes)
    check_conv(spatial, size, stride, channels, None)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [5, 3])
@pytest.mark.parametrize(("spatial", "size", "stride"), CASES)
def test_images_multiplied_one_after_the_other_change_nothing(
    spatial, size, stride, channels, monkeypatch
):
    monkeypatch.setattr(convolutions, "_TILE_BYTES", 1)
    check_conv(spatial, size, stride, channels, None)


def test_images_are_multiplied_together_as_far_as_their_patches_fit():
    def images(batch, side, rows=16):
        x = jnp.zeros((16, batch, side, side))
        return convolutions._images_at_once(x, convolutions._window(x, 3, 1, 1), rows)

    assert (images(16, 32), images(16, 128), images(12, 24)) == (1, 1, 1)
    assert images(12, 18) == 3  # of 187 kB each
    assert images(16, 32, rows=64) == 16  # much is made of each patch


@pytest.mark.slow
@pytest.mark.parametrize("channels", [5, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("patch_bytes", [2**28, 1])
@pytest.mark.parametrize(("spatial", "size", "stride"), [((7, 6), 3, 1), ((7, 6), 3, 2)])
def test_conv_with_another_padding(
    spatial, size, stride, patch_bytes, padding, channels, monkeypatch
):
    monkeypatch.setattr(convolutions, "_PATCH_BYTES", patch_bytes)
    check_conv(spatial, size, stride, channels, padding)


def check_conv(spatial, size, stride, channels, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (channels, 2, *spatial))
    kernel = jax.random.normal(keys[1], (*(size,) * len(spatial), channels, 5))
    pad = size // 2 if padding is None else padding
    ours, pull = jax.vjp(lambda x, k: conv(x, k, stride, padding), x, kernel)
    theirs, reference_pull = jax.vjp(lambda x, k: xla_conv(x, k, stride, pad), x, kernel)
    cotangent = jax.random.normal(keys[2], theirs.shape)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    for got, wanted in zip(pull(cotangent), reference_pull(cotangent), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-4)


def test_patches_are_made_in_as_few_parts_as_memory_allows(monkeypatch):
    x = jnp.zeros((2, 1, 4, 4, 4))  # 512 bytes an offset
    for limit, fixed in [(2**28, 0), (27 * 512, 0), (26 * 512, 1), (9 * 512, 1), (512, 3)]:
        monkeypatch.setattr(convolutions, "_PATCH_BYTES", limit)
        groups = convolutions._offset_groups(x, convolutions._window(x, 3, 1, 1))
        assert groups.shape == (3**fixed, fixed)
        assert len({tuple(leading) for leading in groups.tolist()}) == 3**fixed


def test_conv_over_stacked_clients_in_parts_equals_one_by_one(monkeypatch):
    monkeypatch.setattr(convolutions, "_PATCH_BYTES", 1)
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 4, 3, 5))
    kernels = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 2, 4))
    together = jax.vmap(lambda x, k: conv(x, k, 2))(x, kernels)
    for i in range(3):
        np.testing.assert_allclose(together[i], conv(x[i], kernels[i], 2), rtol=1e-5, atol=1e-5)


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


@pytest.mark.slow
def test_conv_over_stacked_clients_equals_one_by_one():
    x = jax.random.normal(jax.random.key(0), (5, 3, 2, 6, 6))
    kernels = jax.random.normal(jax.random.key(1), (5, 3, 3, 3, 4))
    together = jax.vmap(conv)(x, kernels)
    for i in range(5):
        np.testing.assert_allclose(together[i], conv(x[i], kernels[i]), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("patch_bytes", [2**28, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(300, 4), (4, 300)])
def test_conv_in_bfloat16_sums_in_float32(channels, stride, patch_bytes, monkeypatch):
    monkeypatch.setattr(convolutions, "_PATCH_BYTES", patch_bytes)
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
    """On a transposed view too, of which XLA's CPU back end multiplies no bfloat16."""
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


NETWORKS = {
    "resnet": resnet(14, 5),
    "cnn": cnn((4, 6), 5),
    **{
        norm: unet(UNetSize((2, 3, 4), 2), 5, norm=norm, remat=norm != "batch")
        for norm in ("batch", "group", "none")
    },
}


def features_and_gradients(model):
    """A jitted ``params -> ((loss, (features, batch_stats)), gradients)``, and the parameters."""
    variables = jax.jit(model.init, static_argnums=1)(jax.random.key(0), (8, 12, 3))
    x = jax.random.normal(jax.random.key(1), (3, 8, 12, 3))

    def loss(params):
        now = {"params": {"features": params}, "batch_stats": variables["batch_stats"]}
        features, stats = model.features(now, x, train=True, mask=jnp.array([True, True, False]))
        return jnp.mean(features**2), (features, stats)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return run, variables["params"]["features"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_bfloat16_multiplies_in_it_and_gives_float32(name):
    plain, params = features_and_gradients(NETWORKS[name])
    assert "bf16" not in plain.lower(params).as_text()
    run, params = features_and_gradients(with_compute_dtype(NETWORKS[name], jnp.bfloat16))
    lowered = run.lower(params)
    products = re.findall(r"stablehlo.dot_general .*: (.*)", lowered.as_text())
    assert products
    for product in products:
        assert re.sub(r"tensor<[\dx]*(\w+)>", r"\1", product) == "(bf16, bf16) -> f32"
    # As training compiles it: barriers then stay to the end on a CPU, before products too.
    program = lowered.compile(compiler_options=compiler_options())
    (loss, out), grads = program(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((out, grads))} == {jnp.dtype("float32")}
    assert loss == pytest.approx(float(plain(params)[0][0]), rel=0.05)


@pytest.mark.slow
def test_in_bfloat16_under_float64_all_that_leaves_a_network_is_float64(float64):
    run, params = features_and_gradients(with_compute_dtype(NETWORKS["resnet"], jnp.bfloat16))
    leaves = jax.tree.leaves(run(params))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float64")}
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.slow
def test_normalize_is_differentiated_as_autodiff_would():
    x = jax.random.normal(jax.random.key(0), (3, 5, 2, 2)) * 3 + 1
    mask = jnp.array([True, True, False, True, True])
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def plain(x):
        weight = mask.astype(x.dtype)[None, :, None, None]
        count = jnp.sum(mask) * 4
        mean = jnp.sum(x * weight, (1, 2, 3), keepdims=True) / count
        var = jnp.sum((x - mean) ** 2 * weight, (1, 2, 3), keepdims=True) / count
        return (x - mean) / jnp.sqrt(var + 1e-5)

    got = jax.grad(lambda x: jnp.sum(layers.normalize(x, mask, 1e-5)[0] * weights))(x)
    wanted = jax.grad(lambda x: jnp.sum(plain(x) * weights))(x)
    np.testing.assert_allclose(layers.normalize(x, mask, 1e-5)[0], plain(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_depth_is_the_number_of_layers_with_weights():
    for depth in RESNET_DEPTHS.values():
        shapes = jax.eval_shape(lambda d=depth: resnet(d, 8).init(jax.random.key(0), (32, 32, 3)))
        stacked = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
            if path[-1].key == "kernel":
                blocks = any(entry.key == layers.STACKED for entry in path)
                stacked += leaf.shape[0] if blocks else 1
        assert stacked == depth


@pytest.mark.parametrize("depth", [0, 2, 19, 21])
def test_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        resnet(depth, 8)


def test_he_initialisation():
    variables = jax.jit(resnet(20, 10).init, static_argnums=1)(jax.random.key(0), (32, 32, 3))
    features = variables["params"]["features"]
    for kernel, fan_in in [
        (features["stage3"]["rest"]["conv1"]["kernel"], 9 * 64),
        (features["stage2"]["first"]["conv1"]["kernel"], 9 * 16),
        (variables["params"]["head"]["kernel"], 64),
    ]:
        assert np.std(kernel) == pytest.approx(np.sqrt(2 / fan_in), rel=0.1)
        assert abs(np.mean(kernel)) < 0.1 * np.sqrt(2 / fan_in)
    # Blocks that are stacked start differently.
    rest = features["stage1"]["rest"]["conv1"]["kernel"]
    assert np.abs(rest[0] - rest[1]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("model", [resnet(8, 5), cnn((4, 6), 5)], ids=["resnet", "cnn"])
def test_any_image_size_and_evaluation_mode_leave_the_statistics_alone(model):
    variables = model.init(jax.random.key(0), (9, 13, 3))
    x = jax.random.normal(jax.random.key(1), (2, 9, 13, 3))
    logits, stats = apply_model(model, variables, x)
    assert logits.shape == (2, 5)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


def test_the_cnns_have_two_layers_and_features_of_one_width():
    for widths in CNNS.values():
        shapes = jax.eval_shape(lambda w=widths: cnn(w, 7).init(jax.random.key(0), (12, 10, 3)))
        kernels = shapes["params"]["features"]
        assert [kernels[f"conv{i}"]["kernel"].shape for i in (1, 2)] == [
            (3, 3, 3, widths[0]),
            (3, 3, *widths),
        ]
        assert shapes["params"]["head"]["kernel"].shape == (32, 7)
