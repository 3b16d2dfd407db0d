"""The kernels for TPUs, interpreted, against the layers that they replace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from fedhelp_jax.core.compilation import traced_for, tracing_for
from fedhelp_jax.models import conv_tpu
from fedhelp_jax.models.conv import conv
from fedhelp_jax.models.resnet import FusedBlock, Stage, Stem

CLIENTS, CHANNELS, BATCH, SIDES, FEATURES = 2, 8, 6, (8, 16), 16
# All images, some of each block, and none of some blocks.
MASKS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def reference(x, gain, shift, kernel, mask):
    """Returns what `conv_tpu.conv_after` does, by the layers of other platforms."""
    gain, shift = (a[:, None] for a in (gain, shift))
    active = jax.nn.relu(gain * x + shift).astype(x.dtype).reshape(len(x), -1, *SIDES)
    out = conv(active, kernel).reshape(kernel.shape[-1], -1)
    weight = jnp.repeat(mask, SIDES[0] * SIDES[1]).astype(gain.dtype)
    count, wide = jnp.sum(weight), out.astype(gain.dtype)
    mean = wide @ weight / count
    return out, (mean, jnp.square(wide - mean[:, None]) @ weight / count, count)


@pytest.mark.parametrize(
    ("images", "dtype"), [(1, "float32"), (3, "float32"), (6, "float32"), (2, "bfloat16")]
)
def test_value_statistics_and_gradients_equal_those_of_layers(monkeypatch, images, dtype):
    most = 9 * 4 * FEATURES * SIDES[0] * SIDES[1] * images
    monkeypatch.setattr(conv_tpu, "_COPIES", most)
    rng = np.random.default_rng(0)
    length = BATCH * SIDES[0] * SIDES[1]
    shapes = [(CHANNELS, length), (CHANNELS,), (CHANNELS,), (3, 3, CHANNELS, FEATURES)]
    x, *rest = (rng.normal(size=(CLIENTS, *s)).astype(np.float32) for s in shapes)
    args = [jnp.asarray(x, dtype), *rest]
    weights = [
        rng.normal(size=(CLIENTS, *s)).astype(np.float32)
        for s in ((FEATURES, length), (FEATURES,), (FEATURES,))
    ]

    def run(fn):
        def loss(args, mask, weights):
            out, (mean, var, _) = fn(*args, mask)
            found = (out, mean, var)
            return sum(jnp.sum(w * v) for w, v in zip(weights, found, strict=True)), found

        both = jax.vmap(jax.value_and_grad(loss, has_aux=True))
        return jax.jit(both)(args, MASKS, weights)

    ours = run(functools.partial(conv_tpu.conv_after, sides=SIDES))
    for got, expected in zip(*map(jax.tree.leaves, (ours, run(reference))), strict=True):
        expected = np.asarray(expected, np.float32)
        bound = 2e-6 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(got, expected, atol=bound * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "channels", "pixels"),
    [
        (Stem(train=True), 3, (8, 16)),
        (Stage(8, 1, 2, train=True), 8, (8, 16)),
        (Stage(16, 2, 2, train=True), 8, (15, 32)),
    ],
    ids=["stem", "stage", "strided"],
)
def test_parts_of_a_network_train_as_with_its_layers(stage, channels, pixels):
    """Value, statistics and gradients."""
    # Like the results of the layers before, the inputs of stages are not negative.
    images = jax.random.normal(jax.random.key(1), (channels, 4, *pixels))
    images = images if channels == 3 else jnp.abs(images)
    mask = np.array([1, 1, 1, 0], bool)
    variables = jax.jit(stage.init)(jax.random.key(0), images, mask)

    def loss(params, images):
        out, after = stage.apply(
            variables | {"params": params}, images, mask, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(out)), after

    def run(platform):
        gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        with tracing_for(platform):
            program = jax.jit(gradients).trace(variables["params"], images)
        return program.lower().compile()(variables["params"], images), str(program.jaxpr)

    (expected, without), (got, with_kernels) = run("cpu"), run("tpu")
    assert "pallas_call" not in without and "pallas_call" in with_kernels
    assert traced_for() is None
    named = jax.tree.leaves_with_path(got)
    for (path, a), b in zip(named, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a, b, atol=1e-4 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    ("shape", "dtype", "platform", "used"),
    [
        ((16, 4, 32, 32), jnp.float32, "tpu", True),
        ((16, 4, 32, 32), jnp.bfloat16, "tpu", True),
        ((16, 4, 32, 32), jnp.float32, "gpu", False),
        ((12, 4, 32, 32), jnp.float32, "tpu", False),
        ((64, 4, 32, 32), jnp.float32, "tpu", False),
        ((16, 3, 5, 5), jnp.float32, "tpu", False),
        ((16, 4, 8, 8, 8), jnp.float32, "tpu", False),
        ((16, 4, 32, 32), jnp.float16, "tpu", False),
    ],
)
def test_other_programs_and_shapes_keep_the_layers(shape, dtype, platform, used):
    assert not conv_tpu.suits(shape, dtype)
    with tracing_for(platform):
        assert conv_tpu.suits(shape, dtype) == used


@pytest.mark.slow
def test_a_batch_without_examples_gives_finite_numbers_and_keeps_the_running_statistics():
    block = FusedBlock(8, 1, SIDES)
    x, mask = jnp.ones((8, 2 * SIDES[0] * SIDES[1])), jnp.zeros(2, bool)
    variables = block.init(jax.random.key(0), x, mask)

    def apply(x):
        (out, _), after = block.apply(variables, x, mask, mutable=["batch_stats"])
        return jnp.sum(out), after["batch_stats"]

    (_, after), grad = jax.jit(jax.value_and_grad(apply, has_aux=True))(x)
    assert np.isfinite(grad).all()
    for a, b in zip(*map(jax.tree.leaves, (after, variables["batch_stats"])), strict=True):
        np.testing.assert_array_equal(a, b)
