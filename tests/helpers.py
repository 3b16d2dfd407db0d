"""A federation of a few dozen tiny images, tiny networks, and helpers to run and compare them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.algorithms.base import FederatedAlgorithm, PublicSpec, Setup
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.federation import Federation, assign_roles, make_federation
from fedhelp_jax.data.types import (
    ClientSplit,
    FederatedDataset,
    PublicDataset,
    check_federated,
    image_sha256,
)
from fedhelp_jax.models.layers import linear
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.models.registry import MODELS, Architecture
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.round import RoundProgram, num_clients
from fedhelp_jax.simulation.streaming import StreamedRounds
from fedhelp_jax.simulation.vectorize import make_mapping
from fedhelp_jax.tasks import classification
from fedhelp_jax.teachers.base import PublicImages, clear_public

SIZE, CLASSES, PUBLIC_CLASSES, ANSWERS = 8, 4, 5, 6
BATCH, PUBLIC_BATCH = 4, 3

# (name, train, validation, test), with a single training example, no validation, partial batches.
CLIENTS = (
    ("north", 6, 1, 4),
    ("big", 13, 2, 5),
    ("village", 1, 0, 2),
    ("town", 9, 1, 3),
    ("coast", 5, 0, 1),
)
ABSENT = {"coast": 2}  # a class of which the client has no example


def tiny_model(num_classes: int, width: int = 4) -> Model:
    """Returns mean pooling, a dense layer, batch normalisation as in PyTorch, ReLU and a head."""

    def init(key: jax.Array, sample_shape: tuple[int, ...]) -> Variables:
        rows, columns, channels = sample_shape
        inputs = (rows // 4) * (columns // 4) * channels
        # All weights come from one draw, since a draw takes longer to compile than the network.
        draw = jax.random.uniform(key, (width, inputs + num_classes), float, -1.0, 1.0)
        head = {"kernel": draw[:, inputs:], "bias": jnp.zeros(num_classes)}
        return {
            "params": {"features": {"dense": draw[:, :inputs].T}, "head": head},
            "batch_stats": {"mean": jnp.zeros(width), "var": jnp.ones(width)},
        }

    def features(variables, x, *, train, mask=None):
        stats = variables["batch_stats"]
        batch, rows, columns, channels = x.shape
        x = x.reshape(batch, rows // 4, 4, columns // 4, 4, channels).mean(axis=(2, 4))
        x = x.reshape(batch, -1) @ variables["params"]["features"]["dense"]
        mean, var = stats["mean"], stats["var"]
        if train:
            valid = (jnp.ones(batch) if mask is None else mask.astype(x.dtype))[:, None]
            count = jnp.sum(valid)
            mean = jnp.sum(x * valid, axis=0) / jnp.maximum(count, 1)
            var = jnp.sum(jnp.square(x - mean) * valid, axis=0) / jnp.maximum(count, 1)
            step = 0.1 * (count > 0)
            unbiased = var * count / jnp.maximum(count - 1, 1)
            stats = {
                "mean": stats["mean"] + step * (jax.lax.stop_gradient(mean) - stats["mean"]),
                "var": stats["var"] + step * (jax.lax.stop_gradient(unbiased) - stats["var"]),
            }
        return jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5)), stats

    return Model(init, features, linear)


def tiny_dataset(clients=CLIENTS, seed: int = 0) -> FederatedDataset:
    """Returns random images whose class shifts their brightness; a client's rows are contiguous."""
    rng = np.random.default_rng(seed)
    labels, splits, start = [], [], 0
    for name, *sizes in clients:
        classes = [c for c in range(CLASSES) if c != ABSENT.get(name)]
        labels.extend(rng.choice(classes, size=sum(sizes)))
        index = start + rng.permutation(sum(sizes)).astype(np.int32)
        start += sum(sizes)
        splits.append(ClientSplit(name, *np.split(index, np.cumsum(sizes)[:2])))
    labels = np.array(labels, np.int32)
    noise = rng.integers(0, 160, size=(len(labels), SIZE, SIZE, 3))
    images = (noise + 25 * labels[:, None, None, None]).astype(np.uint8)
    names = tuple("ABCD"[:CLASSES])
    return check_federated(FederatedDataset("tiny", True, images, labels, names, tuple(splits)))


def tiny_public(num_examples: int = 10, seed: int = 1) -> PublicDataset:
    """Returns random public images with their own label space."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, size=(num_examples, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, PUBLIC_CLASSES, size=num_examples).astype(np.int32)
    names = tuple(f"p{i}" for i in range(PUBLIC_CLASSES))
    sha256 = tuple(image_sha256(image) for image in images)
    return PublicDataset("tiny_public", True, images, labels, names, sha256, images)


def public_images(images: np.ndarray) -> PublicImages:
    """Returns images ``[B, H, W, C]``, or a list of images of any sizes, as `PublicImages`."""
    sha256 = tuple(image_sha256(image) for image in images)
    public = tiny_public(len(sha256))._replace(sha256=sha256, originals=images)
    return clear_public(public, tiny_dataset())


def tiny_federation(
    clients=CLIENTS,
    *,
    top_n: int = 2,
    public: PublicDataset | None = None,
    on_host: bool = False,
) -> Federation:
    """Returns the tiny clients, of which the ``top_n`` biggest are large, and public answers."""
    dataset = tiny_dataset(clients)
    answers = None
    if public is not None:
        rng = np.random.default_rng(2)
        answers = 2 * rng.normal(size=(len(public.images), ANSWERS)).astype(np.float32)
    roles = assign_roles(dataset, top_n=top_n)
    return make_federation(dataset, roles, public, answers, on_host=on_host)


def tiny_setup(**changes: Any) -> Setup:
    """Returns the set-up of a method: two tiny architectures, SGD, no public set."""
    setup = Setup(
        task=classification,
        num_classes=CLASSES,
        sample_shape=(SIZE, SIZE, 3),
        models={"small": tiny_model(CLASSES, 4), "large": tiny_model(CLASSES, 7)},
        tx=optax.sgd(0.1, momentum=0.5),
        batch_size=BATCH,
        public_batch_size=PUBLIC_BATCH,
        local_epochs=1,
        public=None,
    )
    return setup._replace(**changes)


PUBLIC = PublicSpec(num_images=10, num_labels=PUBLIC_CLASSES, num_answers=ANSWERS, shared=False)


# The methods that can run with a simulated teacher: the others need a model at the clients.
FROM_IMAGES = [name for name, method in ALGORITHMS.items() if not method.reads_answers]


def build(name: str, setup: Setup, **settings: Any) -> FederatedAlgorithm:
    """Builds a method by name."""
    method = ALGORITHMS[name]
    return method.build(setup, method.settings(**settings))


def simulate(
    algorithm: FederatedAlgorithm,
    federation: Federation,
    *,
    chunk_size: int | None = 1,
    num_devices: int = 1,
    private: bool = False,
    seed: int = 0,
    rounds_at_once: int = 1,
    max_device_bytes: int = 0,
    **options: Any,
) -> CompiledRounds:
    """Returns a simulation, by default on one device with clients one after the other."""
    mapping = make_mapping(chunk_size, num_devices, private=private)
    phases = RoundProgram(algorithm, classification, num_clients(federation), mapping, **options)
    if max_device_bytes:
        return StreamedRounds(phases, federation, seed=seed, max_device_bytes=max_device_bytes)
    return CompiledRounds(phases, federation, seed=seed, rounds_at_once=rounds_at_once)


def on_host(tree: Any) -> Any:
    """Returns a copy as NumPy arrays, which survives the donation of the original."""
    return jax.tree.map(np.array, tree)


def row(tree: Any, index: int) -> Any:
    """Returns one client of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def run(simulation: CompiledRounds, rounds: int, state: Any = None) -> Any:
    """Returns the state on the host after some rounds."""
    state = simulation.init() if state is None else state
    for round in range(rounds):
        state, _ = simulation.round(state, round)
    return on_host(state)


def use_tiny_networks(patch: pytest.MonkeyPatch) -> None:
    """Makes runs build tiny networks, with a different width for each role, instead of ResNets."""
    for name, width in (("resnet20", 4), ("resnet32", 7)):
        tiny = Architecture(functools.partial(tiny_model, width=width), "tiny", ("classification",))
        patch.setitem(MODELS._found, name, tiny)


def assert_trees_close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Checks that trees have the same leaves up to ``tolerance``, relative to their largest value.

    Paths, dtypes and shapes must be equal.
    """
    got, expected = (dict(jax.tree.leaves_with_path(tree)) for tree in (got, expected))
    assert got.keys() == expected.keys()
    assert got, "nothing is compared"
    for path, leaf in expected.items():
        name = jax.tree_util.keystr(path)
        ours, theirs = np.asarray(got[path]), np.asarray(leaf)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        scale = max(1.0, np.abs(theirs).max(initial=0.0)) if theirs.dtype.kind == "f" else 0.0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale, err_msg=name)


def assert_trees_equal(got: Any, expected: Any) -> None:
    """Checks that trees are equal bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    leaves = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
    assert leaves, "nothing is compared"
    for ours, theirs in leaves:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()


def differs(got: Any, expected: Any) -> bool:
    """Returns whether any leaf differs."""
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return any(not np.array_equal(ours, theirs) for ours, theirs in leaves)


def plain_adam(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """Returns a reference Adam with L2 decay, written like ``torch.optim.Adam``."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros, 0

    def update(updates, state, params=None):
        first, second, count = state
        count += 1
        grads = jax.tree.map(lambda g, p: g + weight_decay * p, updates, params)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)

        def step(m, v):
            m_hat, v_hat = m / (1 - 0.9**count), v / (1 - 0.999**count)
            return -learning_rate * m_hat / (jnp.sqrt(v_hat) + 1e-8)

        return jax.tree.map(step, first, second), (first, second, count)

    return optax.GradientTransformation(init, update)


def refusal(do: Callable[[], Any], kind: type[UserError] = UserError) -> str:
    """Returns the one-line message with which a call is refused."""
    with pytest.raises(kind) as error:
        do()
    message = str(error.value)
    assert "\n" not in message
    return message
