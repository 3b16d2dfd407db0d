"""A two-layer network in NumPy float64 with hand-written gradients, as a reference for methods.

The reference uses nothing of ``fedhelp_jax`` except the order of the batches. Its parameters are
``{"features": {"dense": [D, H]}, "head": {"kernel": [H, C], "bias": [C]}}``.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import CLASSES, SIZE, build, on_host, row, simulate, tiny_federation, tiny_setup

from fedhelp_jax.algorithms.client import shuffled
from fedhelp_jax.core.random import Purpose, client_round_key, for_purpose, server_round_key
from fedhelp_jax.models.layers import linear
from fedhelp_jax.models.model import Model

Tree = dict[str, Any]
INPUTS = SIZE * SIZE * 3
RATE = 0.05  # learning rate of every optimizer here


def two_layers(width: int) -> Model:
    """Returns ``tanh(x W1) W2 + b`` as a network of the package, without batch statistics."""

    def init(key, sample_shape):
        first, second = jax.random.split(key)
        return {
            "params": {
                "features": {"dense": 0.1 * jax.random.normal(first, (INPUTS, width))},
                "head": {
                    "kernel": jax.random.normal(second, (width, CLASSES)),
                    "bias": jnp.zeros(CLASSES),
                },
            },
            "batch_stats": {},
        }

    def features(variables, x, *, train, mask=None):
        del train, mask
        return jnp.tanh(x.reshape(len(x), -1) @ variables["params"]["features"]["dense"]), {}

    return Model(init, features, linear)


def setup(**changes: Any) -> Any:
    """Returns the set-up of a method: two-layer architectures, plain SGD, two local epochs."""
    models = {"small": two_layers(4), "large": two_layers(7)}
    given = {"models": models, "tx": optax.sgd(RATE), "learning_rate": RATE, "local_epochs": 2}
    return tiny_setup(**{**given, **changes})


def rounds_of(name: str, count: int, federation: Any = None, given: Any = None, **settings: Any):
    """Returns ``(simulation, states)``, with the states on the host before and after each round."""
    federation = tiny_federation() if federation is None else federation
    simulation = simulate(build(name, given or setup(), **settings), federation)
    state = simulation.init()
    states = [on_host(state)]
    for round in range(count):
        state, _ = simulation.round(state, round)
        states.append(on_host(state))
    return simulation, states


def clients_of(federation: Any) -> Iterator[tuple[str, int, int, np.ndarray]]:
    """Yields ``(role, row in its group, id, positions of its training examples)`` by client."""
    for group in federation.groups:
        for i, client_id in enumerate(np.asarray(group.ids)):
            index, size = row(group.train, i)
            yield group.role, i, int(client_id), np.asarray(index)[: int(size)]


def examples(federation: Any, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns images ``[n, D]`` in [-1, 1] and labels ``[n]``."""
    images = np.asarray(federation.pool.images, np.float64)[index] / 127.5 - 1
    return images.reshape(len(index), -1), np.asarray(federation.pool.targets)[index]


def batches(
    federation: Any, round: int, client_id: int, index: np.ndarray, epochs: int = 2, size: int = 4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields a client's batches in a round with seed 0; an epoch's last batch may be shorter."""
    key = client_round_key(jax.random.key(0), round, client_id)
    yield from _in_order(for_purpose(key, Purpose.PRIVATE_BATCHES), federation, index, epochs, size)


def server_batches(
    federation: Any, round: int, index: np.ndarray, epochs: int = 2, size: int = 4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the batches of a server that trains like a client on these examples, in order."""
    key = for_purpose(server_round_key(jax.random.key(0), round), Purpose.PRIVATE_BATCHES)
    yield from _in_order(key, federation, index, epochs, size)


def _in_order(key: Any, federation: Any, index: np.ndarray, epochs: int, size: int):
    for epoch in range(epochs):
        order = np.asarray(shuffled(jax.random.fold_in(key, epoch), len(index), len(index)))
        for start in range(0, len(index), size):
            yield examples(federation, index[order[start : start + size]])


def forward(params: Tree, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns features ``[B, H]`` and logits ``[B, C]``."""
    features = np.tanh(x @ params["features"]["dense"])
    return features, features @ params["head"]["kernel"] + params["head"]["bias"]


def backward(params: Tree, x: np.ndarray, d_logits: np.ndarray, d_features: Any = 0.0) -> Tree:
    """Returns gradients, given derivatives by logits ``[B, C]`` and by features ``[B, H]``."""
    features, _ = forward(params, x)
    d_features = d_features + d_logits @ params["head"]["kernel"].T
    return {
        "features": {"dense": x.T @ (d_features * (1 - features**2))},
        "head": {"kernel": features.T @ d_logits, "bias": d_logits.sum(axis=0)},
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def d_cross_entropy(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the derivative by the logits of the mean cross-entropy over a batch."""
    return (softmax(logits) - np.eye(CLASSES)[y]) / len(y)


def d_divergence(logits: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Returns the derivative by the logits of the mean KL(softmax(teacher) || softmax(logits))."""
    return (softmax(logits) - softmax(teacher)) / len(logits)


def gradient(params: Tree, x: np.ndarray, y: np.ndarray) -> Tree:
    """Returns the gradient of the mean cross-entropy."""
    return backward(params, x, d_cross_entropy(forward(params, x)[1], y))


def combine(function: Any, *trees: Tree) -> Tree:
    """Applies ``function`` leaf by leaf."""
    if not isinstance(trees[0], dict):
        return function(*trees)
    return {name: combine(function, *(tree[name] for tree in trees)) for name in trees[0]}


def step(params: Tree, gradient: Tree, rate: float = RATE) -> Tree:
    """Returns ``params - rate * gradient``."""
    return combine(lambda p, g: p - rate * g, params, gradient)


def mean(trees: list[Tree]) -> Tree:
    """Returns the unweighted mean of trees."""
    return combine(lambda *leaves: np.mean(leaves, axis=0), *trees)
