"""Normalisation against its formula, dtypes, the shape of networks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhelp_jax.models import layers
from fedhelp_jax.models.cnn import CNNS, cnn
from fedhelp_jax.models.model import (
    apply_model,
    multiplied_in,
    with_compute_dtype,
    with_precision,
)
from fedhelp_jax.models.resnet import RESNET_DEPTHS, resnet
from fedhelp_jax.models.unet import UNetSize, unet

NETWORKS = {
    "resnet": resnet(14, 5),
    "cnn": cnn((4, 6), 5),
    **{
        norm: unet(UNetSize((2, 3, 4), 2), 5, norm=norm, remat=norm != "batch")
        for norm in ("batch", "group", "none")
    },
}


def features_and_gradients(model, wrap=lambda fn: fn):
    """A jitted ``params -> ((loss, (features, batch_stats)), gradients)``, and the parameters."""
    variables = jax.jit(model.init, static_argnums=1)(jax.random.key(0), (8, 12, 3))
    x = jax.random.normal(jax.random.key(1), (3, 8, 12, 3))

    def loss(params):
        now = {"params": {"features": params}, "batch_stats": variables["batch_stats"]}
        features, stats = model.features(now, x, train=True, mask=jnp.array([True, True, False]))
        return jnp.mean(features**2), (features, stats)

    run = jax.jit(jax.value_and_grad(wrap(loss), has_aux=True))
    return run, variables["params"]["features"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_bfloat16_multiplies_in_it_on_accelerators_and_gives_float32(name):
    plain, params = features_and_gradients(NETWORKS[name])
    assert "bf16" not in plain.lower(params).as_text()
    run, params = features_and_gradients(with_compute_dtype(NETWORKS[name], jnp.bfloat16))
    text = run.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"stablehlo.(?:dot_general|convolution).*: (\(tensor.*)", text)
    assert products
    for product in products:
        assert re.sub(r"tensor<[\dx]*(\w+)>", r"\1", product).startswith("(bf16, bf16) -> ")
    (loss, out), grads = run(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((out, grads))} == {jnp.dtype("float32")}
    assert loss == pytest.approx(float(plain(params)[0][0]), rel=0.05)


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("name", ["resnet", "batch"])
def test_every_product_of_value_and_gradients_has_the_precision_that_is_set(name, wrap, precision):
    """As lowered for a GPU, which need not be here."""
    run, params = features_and_gradients(with_precision(NETWORKS[name], precision), wrap)
    text = run.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"stablehlo.(?:dot_general|convolution).*", text)
    assert len(products) > 10  # equal layers share their code
    for product in products:
        assert ("HIGHEST" in product) == (precision == "highest"), product


@pytest.mark.parametrize(
    ("dtype", "precision", "platform", "expected"),
    [
        ("float32", "highest", "cpu", "float32"),
        ("bfloat16", "default", "cpu", "float32"),
        ("float32", "default", "gpu", "TF32 where the GPU has it"),
        ("float32", "high", "gpu", "TF32 where the GPU has it"),
        ("float32", "highest", "gpu", "float32"),
        ("bfloat16", "highest", "gpu", "bfloat16"),
        ("float32", "default", "tpu", "bfloat16"),
        ("float32", "high", "tpu", "bfloat16, three passes"),
    ],
)
def test_what_products_are_computed_in_is_told(dtype, precision, platform, expected):
    assert multiplied_in(dtype, precision, platform) == expected


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
