"""Networks, optimizer and FedHelp's client steps against PyTorch (``torch_reference.py``).

Several steps are compared in float64: in float32 Adam amplifies rounding until PyTorch does not
agree with itself. In float32 one gradient is compared.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhelp_jax.algorithms.base import PublicSpec, Setup
from fedhelp_jax.algorithms.client import Batch, PublicBatch, adam_l2
from fedhelp_jax.algorithms.fedhelp import (
    init_large_carry,
    init_small_carry,
    large_step,
    small_step,
)
from fedhelp_jax.algorithms.fedhelp_losses import FedHelpSettings
from fedhelp_jax.losses import cross_entropy_loss, masked_mean
from fedhelp_jax.models.layers import init_linear
from fedhelp_jax.models.model import apply_model
from fedhelp_jax.models.resnet import resnet
from fedhelp_jax.tasks import classification

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no parity to check")
reference = pytest.importorskip("torch_reference", reason="PyTorch is not installed")

CLASSES, PUBLIC_CLASSES, ANSWERS = 8, 9, 17
# Depths; a ResNet-8 has no stacked blocks, and is compiled sooner.
DEPTH, PROXY = 20, 8
STEPS, BATCH, SIZE = 5, 4, 12


def random_tree(shapes, rng, dtype):
    """Random leaves of a network's size: no scale is 1, no mean is 0."""

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        values = {
            "kernel": np.sqrt(2 / max(1, np.prod(shape.shape[-4:-1]))) * noise,
            "scale": 1 + 0.1 * noise,
            "var": 0.5 + rng.random(shape.shape),
        }
        return values.get(path[-1].key, 0.1 * noise).astype(dtype)

    return jax.tree.map_with_path(leaf, shapes)


def random_variables(depth, seed, dtype):
    shapes = jax.eval_shape(lambda: resnet(depth, CLASSES).init(jax.random.key(0), (SIZE, SIZE, 3)))
    return random_tree(shapes, np.random.default_rng(seed), dtype)


def random_batch(rng, size, num_classes, dtype):
    x = rng.uniform(-1, 1, size=(size, SIZE, SIZE, 3)).astype(dtype)
    return x, rng.integers(0, num_classes, size=size).astype(np.int32)


def labels(y):
    return torch.tensor(y.astype(np.int64))


def assert_trees_close(got, expected, tolerance, what=""):
    """The norm of every leaf's difference, relative to the leaf's norm."""
    got, expected = (dict(jax.tree.leaves_with_path(tree)) for tree in (got, expected))
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        name = what + jax.tree_util.keystr(path)
        assert np.shape(got[path]) == leaf.shape, name
        difference = np.linalg.norm(np.asarray(got[path]) - leaf)
        assert difference <= tolerance * np.linalg.norm(leaf), f"{name}: {difference}"


# --- One network ---


@pytest.mark.parametrize("depth", [8, 110])
def test_forward_in_float64(depth):
    with jax.enable_x64(True):
        variables = random_variables(depth, 0, np.float64)
        x, _ = random_batch(np.random.default_rng(0), 6, CLASSES, np.float64)
        theirs = reference.make_resnet(depth, variables)
        assert_trees_close(reference.variables_tree(theirs), variables, 0.0, "round trip ")
        ours = resnet(depth, CLASSES)
        for train in (False, True):
            apply = jax.jit(lambda v, x, t=train: ours.features(v, x, train=t, mask=None))
            features, batch_stats = apply(variables, x)
            theirs.train(train)
            with torch.no_grad():
                expected = theirs.features(reference.images(x))
                logits = theirs.head(expected).numpy()
            assert features.dtype == np.float64
            assert_trees_close(features, expected.numpy(), 1e-10)
            head = ours.head(variables["params"]["head"], features)
            assert_trees_close(head, logits, 1e-10)
            stats = reference.batch_stats_tree(theirs.features)
            assert_trees_close(batch_stats, stats, 1e-10, "batch_stats")


@jax.jit
def value_and_gradient(variables, x, y, mask):
    def loss_fn(params):
        state = variables | {"params": params}
        logits, stats = apply_model(resnet(DEPTH, CLASSES), state, x, train=True, mask=mask)
        loss = masked_mean(cross_entropy_loss(logits, y, where=mask), mask)
        return loss, (logits, stats)

    return jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])


@pytest.mark.parametrize("valid", [8, 5])
def test_one_gradient_in_float32(valid):
    """A padded batch has the gradient, logits and statistics of its valid examples alone."""
    variables = random_variables(DEPTH, 1, np.float32)
    x, y = random_batch(np.random.default_rng(1), 8, CLASSES, np.float32)
    x[valid:], y[valid:] = 100.0, -1
    (loss, (logits, stats)), grads = value_and_gradient(variables, x, y, np.arange(8) < valid)
    theirs = reference.make_resnet(DEPTH, variables).train()
    their_logits = theirs(reference.images(x[:valid]))
    their_loss = reference.cross_entropy(their_logits, labels(y[:valid]))
    their_loss.backward()
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
    assert_trees_close(logits[:valid], their_logits.detach().numpy(), 1e-5)
    assert_trees_close(stats, reference.batch_stats_tree(theirs.features), 1e-5, "batch_stats")
    expected = reference.params_tree(theirs, lambda parameter: parameter.grad)
    assert_trees_close(grads, expected, 1e-4, "gradient ")


def test_a_batch_without_valid_examples_has_no_gradient_and_leaves_the_statistics_alone():
    variables = random_variables(DEPTH, 2, np.float32)
    x, y = random_batch(np.random.default_rng(2), 8, CLASSES, np.float32)
    (loss, (_, stats)), grads = value_and_gradient(variables, x, y, np.zeros(8, bool))
    assert loss == 0.0
    assert_trees_close(stats, variables["batch_stats"], 0.0, "batch_stats")
    assert_trees_close(grads, jax.tree.map(np.zeros_like, variables["params"]), 0.0, "gradient ")


def test_adam_on_given_gradients():
    rng = np.random.default_rng(3)
    start = {"a": rng.normal(size=(7, 5)), "b": 1e-3 * rng.normal(size=11)}
    params: Any = {name: value.astype(np.float32) for name, value in start.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    optimizer = reference.adam(theirs.values())
    tx = adam_l2(1e-3, 1e-4)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for step in range(20):
        grads = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in params.items()}
        grads["b"] *= np.float32(0.0 if step % 3 == 0 else 1e-6)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        optimizer.step()
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    expected = {name: value.detach().numpy() for name, value in theirs.items()}
    assert_trees_close(params, expected, 1e-5)


# --- Several steps of a client, in float64 ---


def setup(small, large=DEPTH):
    return Setup(
        task=classification,
        num_classes=CLASSES,
        sample_shape=(SIZE, SIZE, 3),
        models={"small": resnet(small, CLASSES), "large": resnet(large, CLASSES)},
        tx=adam_l2(1e-3, 1e-4),
        batch_size=BATCH,
        public_batch_size=BATCH + 1,
        local_epochs=1,
        public=PublicSpec(
            num_images=1, num_labels=PUBLIC_CLASSES, num_answers=ANSWERS, shared=False
        ),
    )


def padded(x, y):
    """A shorter batch as our steps get it: padded, with rubbish, and a mask."""
    more = BATCH - len(y)
    x = np.concatenate([x, np.full((more, *x.shape[1:]), 7.0)])
    y, mask = np.concatenate([y, np.zeros(more, np.int32)]), np.arange(BATCH) < BATCH - more
    return Batch(*map(jnp.asarray, (x, y, mask)))


def moments(opt_state):
    return [optax.tree_utils.tree_get(opt_state, name) for name in ("mu", "nu")]


# ADAPTER: the next four functions alone know how our clients are stepped.


@functools.cache
def our_small_step(depth, settings):
    return jax.jit(functools.partial(small_step, setup(depth), settings))


@functools.cache
def our_large_step(settings):
    return jax.jit(functools.partial(large_step, setup(PROXY), settings))


def our_small_steps(depth, settings, surrogate, public_heads, batches, public):
    carry = init_small_carry(setup(depth), settings, surrogate, public_heads)
    losses = []
    for batch, public_batch in zip(batches, public, strict=True):
        batch, public_batch = padded(*batch), PublicBatch(*public_batch)
        carry, info = our_small_step(depth, settings)(carry, batch, public_batch)
        losses.append((info["loss"], info["public_loss"]))
    return {
        "surrogate": carry.surrogate,
        "public_heads": carry.public_heads,
        "private_moments": moments(carry.opt_private),
        "public_moments": moments(carry.opt_public),
        "losses": np.asarray(losses),
    }


def our_large_steps(settings, proxy, large, batches, warm=True):
    carry = init_large_carry(setup(PROXY), proxy, large)
    losses = []
    for batch in batches:
        carry, info = our_large_step(settings)(carry, padded(*batch), jnp.asarray(warm))
        losses.append((info["proxy_loss"], info["loss"]))
    return {
        "proxy": carry.proxy,
        "large": carry.large,
        "proxy_moments": moments(carry.opt_proxy),
        "large_moments": moments(carry.opt_large),
        "losses": np.asarray(losses),
    }


def private_batches(rng):
    """The last one is shorter."""
    sizes = [BATCH] * (STEPS - 1) + [BATCH - 1]
    return [random_batch(rng, size, CLASSES, np.float64) for size in sizes]


@pytest.mark.parametrize(("depth", "public_batch_stats"), [(DEPTH, "discard"), (8, "shared")])
def test_small_client_in_float64(depth, public_batch_stats):
    rng = np.random.default_rng(4)
    settings = FedHelpSettings(
        temperature=2.0, lambda_fm=0.7, public_batch_stats=public_batch_stats
    )
    with jax.enable_x64(True):
        surrogate = random_variables(depth, 4, np.float64)
        widths = {"labels": PUBLIC_CLASSES, "answers": ANSWERS}
        shapes = {
            name: jax.eval_shape(lambda w=width: init_linear(jax.random.key(0), 64, w))
            for name, width in widths.items()
        }
        heads = random_tree(shapes, rng, np.float64)
        batches = private_batches(rng)
        public = [random_batch(rng, BATCH + 1, PUBLIC_CLASSES, np.float64) for _ in batches]
        public = [(*batch, 3 * rng.normal(size=(BATCH + 1, ANSWERS))) for batch in public]
        got = our_small_steps(depth, settings, surrogate, heads, batches, public)

        their_heads = {name: reference.make_head(tree) for name, tree in heads.items()}
        client = reference.SmallClient(reference.make_resnet(depth, surrogate), their_heads)
        losses = [
            client.step(
                reference.images(x),
                labels(y),
                reference.images(public_x),
                labels(public_y),
                torch.tensor(answers),
                lambda_fm=0.7,
                temperature=2.0,
                discard=public_batch_stats == "discard",
            )
            for (x, y), (public_x, public_y, answers) in zip(batches, public, strict=True)
        ]
    names = ("exp_avg", "exp_avg_sq")
    private = [reference.moment(client.opt_private, name) for name in names]
    shared = [reference.moment(client.opt_public, name) for name in names]
    expected = {
        "surrogate": reference.variables_tree(client.model),
        "public_heads": {n: reference.head_tree(head) for n, head in client.heads.items()},
        "private_moments": [reference.params_tree(client.model, get) for get in private],
        "public_moments": [
            {
                "features": reference.features_tree(client.model.features, get),
                "public_heads": {n: reference.head_tree(h, get) for n, h in client.heads.items()},
            }
            for get in shared
        ],
        "losses": np.asarray(losses),
    }
    assert_trees_close(got, expected, 1e-6)


@pytest.mark.parametrize("warm", [True, False])
def test_large_client_in_float64(warm):
    """A client that is not warm takes the steps that zero weights would give."""
    rng = np.random.default_rng(5)
    weights: Any = {"temperature": 2.0, "lambda_f": 0.7, "lambda_b": 0.4, "margin": 0.1}
    with jax.enable_x64(True):
        proxy = random_variables(PROXY, 5, np.float64)
        large = random_variables(DEPTH, 6, np.float64)
        batches = private_batches(rng)
        got = our_large_steps(FedHelpSettings(**weights), proxy, large, batches, warm)
    client = reference.LargeClient(
        reference.make_resnet(PROXY, proxy), reference.make_resnet(DEPTH, large)
    )
    if not warm:
        weights |= {"lambda_f": 0.0, "lambda_b": 0.0}
    # k = 5 is the default for 8 classes.
    losses = [client.step(reference.images(x), labels(y), k=5, **weights) for x, y in batches]
    expected: dict[str, Any] = {
        name: [
            reference.params_tree(model, reference.moment(optimizer, moment))
            for moment in ("exp_avg", "exp_avg_sq")
        ]
        for name, model, optimizer in [
            ("proxy_moments", client.proxy, client.opt_proxy),
            ("large_moments", client.large, client.opt_large),
        ]
    }
    expected["proxy"] = reference.variables_tree(client.proxy)
    expected["large"] = reference.variables_tree(client.large)
    expected["losses"] = np.asarray(losses)
    assert_trees_close(got, expected, 1e-6)
