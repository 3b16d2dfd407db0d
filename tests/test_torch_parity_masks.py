"""U-Nets and FedHelp's client steps on masks against PyTorch (``torch_unet.py``), in float64."""

import functools
from typing import Any, NamedTuple

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
from fedhelp_jax.losses import masked_mean
from fedhelp_jax.models.layers import init_linear
from fedhelp_jax.models.model import Model, apply_model
from fedhelp_jax.models.unet import UNetSize, unet
from fedhelp_jax.tasks import segmentation

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no parity to check")
reference = pytest.importorskip("torch_unet", reason="PyTorch is not installed")
shared_reference = pytest.importorskip("torch_reference", reason="PyTorch is not installed")

# Two does not divide 7, nor four 10.
IMAGES = {2: (12, 10, 3), 3: (6, 8, 7, 1)}
# Masks have a size of their own, here not a whole multiple along every axis.
MASKS = {2: (18, 20), 3: (12, 16, 7)}
# One foreground class, and a background with two.
NAMES = {2: ("lesion",), 3: ("background", "front", "back")}
BATCH, PUBLIC_BATCH, STEPS = 3, 2, 5


class Net(NamedTuple):
    """A U-Net here and there."""

    rank: int
    widths: tuple[int, ...] = (4, 8)
    convs: int = 1
    norm: str = "batch"
    remat: bool = False

    def __str__(self) -> str:
        return f"{self.rank}d-{self.norm}" + "-remat" * self.remat

    @property
    def num_classes(self) -> int:
        return len(NAMES[self.rank])

    def ours(self) -> Model:
        size = UNetSize(self.widths, self.convs)
        return unet(size, self.num_classes, norm=self.norm, remat=self.remat)

    def theirs(self, variables: Any) -> Any:
        return reference.make_unet(self.widths, self.convs, self.norm, variables)

    def random_variables(self, rng: np.random.Generator) -> Any:
        return random_tree(
            jax.eval_shape(lambda: self.ours().init(jax.random.key(0), IMAGES[self.rank])), rng
        )


def random_tree(shapes, rng):
    """Random leaves of a network's size: no scale is 1, no mean or bias is 0."""

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        values = {
            "kernel": np.sqrt(2 / np.prod(shape.shape[:-1])) * noise,
            "scale": 1 + 0.1 * noise,
            "var": 0.5 + rng.random(shape.shape),
        }
        return values.get(path[-1].key, 0.1 * noise)

    return jax.tree.map_with_path(leaf, shapes)


def random_batch(rng, rank, size, num_classes, mask_shape):
    """Images and masks; the first mask is background only."""
    y = rng.integers(0, max(2, num_classes), size=(size, *mask_shape)).astype(np.uint8)
    y[0] = 0
    return rng.uniform(-1, 1, size=(size, *IMAGES[rank])), y


def assert_trees_close(got, expected, tolerance, what=""):
    """The norm of every leaf's difference, relative to the leaf's norm."""
    got, expected = (dict(jax.tree.leaves_with_path(tree)) for tree in (got, expected))
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        name = what + jax.tree_util.keystr(path)
        assert np.shape(got[path]) == leaf.shape, name
        assert np.asarray(got[path]).dtype == leaf.dtype == np.float64, name
        difference = np.linalg.norm(np.asarray(got[path]) - leaf)
        assert difference <= tolerance * np.linalg.norm(leaf), f"{name}: {difference}"


# --- One network ---


@functools.partial(jax.jit, static_argnums=0)
def evaluate(net, variables, x):
    return apply_model(net.ours(), variables, x)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(net, variables, x, y, mask):
    def loss_fn(params, x):
        state = variables | {"params": params}
        logits, stats = apply_model(net.ours(), state, x, train=True, mask=mask)
        values = segmentation(NAMES[net.rank]).loss(logits, y, where=mask)
        return masked_mean(values, mask), (logits, stats)

    return jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(variables["params"], x)


NETS = [
    Net(rank, widths, convs, norm, remat)
    for rank, widths, convs, norm in [
        (2, (4, 8, 16), 1, "batch"),
        (3, (4, 8), 2, "batch"),
        (2, (4, 16), 1, "group"),  # groups of one and of two channels
        (3, (4, 16), 1, "group"),
        (2, (4, 8), 1, "none"),
        (3, (4, 8), 1, "none"),
    ]
    for remat in (False, True)
]


@pytest.mark.parametrize("net", NETS, ids=str)
def test_logits_statistics_and_gradients(net):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        variables = net.random_variables(rng)
        x, y = random_batch(rng, net.rank, BATCH, net.num_classes, IMAGES[net.rank][:-1])
        theirs = net.theirs(variables)
        assert_trees_close(reference.variables_tree(theirs), variables, 0.0, "round trip ")
        if not net.remat:
            logits, stats = evaluate(net, variables, x)
            with torch.no_grad():
                expected = theirs.eval()(reference.channels_first(x))
            assert_trees_close(logits, reference.channels_last(expected), 1e-12)
            assert_trees_close(stats, variables["batch_stats"], 0.0, "batch_stats")
        for valid in (BATCH, BATCH - 1):
            # What lies behind the mask is rubbish and must not matter.
            x[valid:], y[valid:] = 100.0, 9
            mask = np.arange(BATCH) < valid
            (loss, (logits, stats)), grads = value_and_gradient(net, variables, x, y, mask)

            theirs = net.theirs(variables).train()
            their_x = reference.channels_first(x[:valid]).requires_grad_()
            their_logits = theirs(their_x)
            their_loss = reference.mask_loss(their_logits, torch.tensor(y[:valid]))
            their_loss.backward()
            np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-12)
            assert_trees_close(logits[:valid], reference.channels_last(their_logits), 1e-12)
            stats_after = reference.batch_stats_tree(theirs.features)
            assert_trees_close(stats, stats_after, 1e-12, "batch_stats")
            expected = reference.params_tree(theirs, lambda parameter: parameter.grad)
            assert_trees_close(grads[0], expected, 1e-10, "gradient ")
            assert_trees_close(grads[1][:valid], reference.channels_last(their_x.grad), 1e-10)
            assert not np.any(grads[1][valid:])


# --- Several steps of a client ---


def setup(small, large, public=None):
    return Setup(
        task=segmentation(NAMES[small.rank]),
        num_classes=small.num_classes,
        sample_shape=IMAGES[small.rank],
        models={"small": small.ours(), "large": large.ours()},
        tx=adam_l2(1e-3, 1e-4),
        batch_size=BATCH,
        public_batch_size=PUBLIC_BATCH,
        local_epochs=1,
        public=public,
    )


def padded(x, y):
    """A shorter batch as our steps get it: padded, with rubbish, and a mask."""
    more = BATCH - len(y)
    x = np.concatenate([x, np.full((more, *x.shape[1:]), 7.0)])
    y = np.concatenate([y, np.full((more, *y.shape[1:]), 9, y.dtype)])
    return Batch(*map(jnp.asarray, (x, y, np.arange(BATCH) < BATCH - more)))


def private_batches(rng, net):
    """The last one is shorter."""
    sizes = [BATCH] * (STEPS - 1) + [BATCH - 1]
    shape = MASKS[net.rank]
    return [random_batch(rng, net.rank, size, net.num_classes, shape) for size in sizes]


def tensors(x, y):
    return reference.channels_first(x), torch.tensor(y)


def moments(opt_state):
    return [optax.tree_utils.tree_get(opt_state, name) for name in ("mu", "nu")]


def their_moments(optimizer):
    names = ("exp_avg", "exp_avg_sq")
    return [shared_reference.moment(optimizer, name) for name in names]


@pytest.mark.parametrize(
    ("net", "labels", "answers", "public_batch_stats"),
    [
        # The widths of the heads over public labels and over answers; None: one for both.
        (Net(2, (4, 8), 2), 1, None, "discard"),
        (Net(2, (4, 8), 1), 1, 3, "shared"),
        (Net(3, (4, 8), 1), 3, None, "shared"),
        (Net(3, (4, 8), 1, remat=True), 3, 1, "discard"),
    ],
    ids=["2d-one-head", "2d-two-heads", "3d-one-head", "3d-two-heads"],
)
def test_small_client(net, labels, answers, public_batch_stats):
    rng = np.random.default_rng(1)
    settings = FedHelpSettings(
        temperature=2.0, lambda_fm=0.7, public_batch_stats=public_batch_stats
    )
    widths = {"labels": labels} | ({} if answers is None else {"answers": answers})
    # Answers have a size of their own: along one axis more than the image's, but not in 3D, where
    # PyTorch has no antialiasing.
    answer_shape = {2: (9, 20), 3: (3, 8, 5)}[net.rank] + (answers or labels,)
    public_spec = PublicSpec(1, labels, answers or labels, shared=answers is None)
    with jax.enable_x64(True):
        surrogate = net.random_variables(rng)
        shapes = {
            name: jax.eval_shape(lambda w=width: init_linear(jax.random.key(0), 4, w))
            for name, width in widths.items()
        }
        heads = random_tree(shapes, rng)
        batches = private_batches(rng, net)
        public = [
            random_batch(rng, net.rank, PUBLIC_BATCH, labels, MASKS[net.rank]) for _ in batches
        ]
        public = [(*b, 3 * rng.normal(size=(PUBLIC_BATCH, *answer_shape))) for b in public]

        ours = setup(net, net, public_spec)
        step = jax.jit(functools.partial(small_step, ours, settings))
        carry, losses = init_small_carry(ours, settings, surrogate, heads), []
        for batch, public_batch in zip(batches, public, strict=True):
            carry, info = step(carry, padded(*batch), PublicBatch(*map(jnp.asarray, public_batch)))
            losses.append((info["loss"], info["public_loss"]))
        got = {
            "surrogate": carry.surrogate,
            "public_heads": carry.public_heads,
            "private_moments": moments(carry.opt_private),
            "public_moments": moments(carry.opt_public),
            "losses": np.asarray(losses),
        }
        their_heads = {name: reference.make_head(tree, net.rank) for name, tree in heads.items()}
        client = shared_reference.SmallClient(
            net.theirs(surrogate), their_heads, reference.SEGMENTATION
        )
        losses = [
            client.step(
                *tensors(*batch),
                *tensors(*public_batch),
                reference.channels_first(logits),
                lambda_fm=0.7,
                temperature=2.0,
                discard=public_batch_stats == "discard",
            )
            for batch, (*public_batch, logits) in zip(batches, public, strict=True)
        ]
        expected = {
            "surrogate": reference.variables_tree(client.model),
            "public_heads": {n: reference.head_tree(head) for n, head in client.heads.items()},
            "private_moments": [
                reference.params_tree(client.model, get)
                for get in their_moments(client.opt_private)
            ],
            "public_moments": [
                {
                    "features": reference.features_tree(client.model.features, get),
                    "public_heads": {
                        n: reference.head_tree(head, get) for n, head in client.heads.items()
                    },
                }
                for get in their_moments(client.opt_public)
            ],
            "losses": np.asarray(losses),
        }
        assert_trees_close(got, expected, 1e-8)


PAIRS = {
    "2d": (Net(2, (4, 8), 1), Net(2, (4, 8, 16), 1)),
    "3d": (Net(3, (4, 8), 1), Net(3, (8, 16), 1, remat=True)),
}


@functools.cache
def our_large_step(dimensions):
    settings = FedHelpSettings(temperature=2.0, lambda_f=0.7, lambda_b=0.4, margin=0.1)
    return jax.jit(functools.partial(large_step, setup(*PAIRS[dimensions]), settings))


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("dimensions", PAIRS)
def test_large_client(dimensions, warm):
    """A client that is not warm takes the steps that zero weights would give."""
    rng = np.random.default_rng(2)
    nets = PAIRS[dimensions]
    with jax.enable_x64(True):
        proxy, large = (net.random_variables(rng) for net in nets)
        batches = private_batches(rng, nets[0])
        carry, losses = init_large_carry(setup(*nets), proxy, large), []
        for batch in batches:
            carry, info = our_large_step(dimensions)(carry, padded(*batch), jnp.asarray(warm))
            losses.append((info["proxy_loss"], info["loss"]))
        got = {
            "proxy": carry.proxy,
            "large": carry.large,
            "proxy_moments": moments(carry.opt_proxy),
            "large_moments": moments(carry.opt_large),
            "losses": np.asarray(losses),
        }
        networks = nets[0].theirs(proxy), nets[1].theirs(large)
        client = shared_reference.LargeClient(*networks, reference.SEGMENTATION)
        weights: Any = {"temperature": 2.0, "k": 1, "margin": 0.1}
        weights |= {"lambda_f": 0.7 if warm else 0.0, "lambda_b": 0.4 if warm else 0.0}
        losses = [client.step(*tensors(*batch), **weights) for batch in batches]
        expected: dict[str, Any] = {
            "proxy": reference.variables_tree(client.proxy),
            "large": reference.variables_tree(client.large),
            "losses": np.asarray(losses),
        }
        for name, model, optimizer in [
            ("proxy_moments", client.proxy, client.opt_proxy),
            ("large_moments", client.large, client.opt_large),
        ]:
            expected[name] = [reference.params_tree(model, get) for get in their_moments(optimizer)]
        assert_trees_close(got, expected, 1e-8)
