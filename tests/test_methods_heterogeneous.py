"""Methods of several architectures, against NumPy in float64 written from their papers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ABSENT,
    CLASSES,
    PUBLIC,
    PUBLIC_BATCH,
    assert_trees_close,
    build,
    on_host,
    refusal,
    row,
    simulate,
    tiny_federation,
    tiny_model,
    tiny_public,
)
from numpy_network import (
    RATE,
    backward,
    batches,
    clients_of,
    combine,
    d_cross_entropy,
    d_divergence,
    examples,
    forward,
    gradient,
    rounds_of,
    setup,
    softmax,
    step,
    two_layers,
)

from fedhelp_jax import losses
from fedhelp_jax.algorithms.client import Batch, shuffled
from fedhelp_jax.algorithms.fedmd import Consensus
from fedhelp_jax.algorithms.on_public import learn_answers, public_logits
from fedhelp_jax.algorithms.prototypes import Prototypes, class_means, members_of
from fedhelp_jax.core.random import Purpose, client_round_key, for_purpose, server_round_key
from fedhelp_jax.data.federation import ClientData, Pool, PublicPool
from fedhelp_jax.models.layers import linear
from fedhelp_jax.models.model import Model
from fedhelp_jax.tasks import segmentation

ROUNDS = 3
WIDTH = 4
WHO = pytest.mark.parametrize("half", [False, True], ids=["all", "half"])
pytestmark = pytest.mark.usefixtures("float64")


def one_width(**changes):
    """Both architectures with features of the same width."""
    return setup(models=dict.fromkeys(("small", "large"), two_layers(WIDTH)), **changes)


def with_public(**changes):
    """Architectures of width 4 and 7, and public images."""
    return setup(public=PUBLIC, **changes)


@functools.cache
def federation(top_n=2):
    """Five clients, the second and the fourth of them large, and ten public images."""
    return tiny_federation(top_n=top_n, public=tiny_public())


class Local(NamedTuple):
    """One client in one round: its role, key, training examples, and its batches of them."""

    role: str
    key: jax.Array
    examples: tuple[np.ndarray, np.ndarray]
    batches: list[tuple[np.ndarray, np.ndarray]]


class Sent(NamedTuple):
    """What a client of a role sends, and its weight in the server's mean."""

    role: str
    weight: int
    upload: Any


def compare(name, client, server, given, half, start=None, **settings):
    """Compares the server's and every client's state after every round.

    ``client(server state, own parameters, local) -> (own, upload)``, whoever is absent keeping its
    own; ``server(state, list of what was sent, key) -> state``. With ``half``, half of the clients
    take part, weighted by their examples, on two devices: one slot of the large ones stays empty.
    ``start`` is a server state to start from. Returns the clients' states after the first round.
    """
    data, run_key = federation(), jax.random.key(0)
    options = (
        {"participation_rate": 0.5, "client_weights": "examples", "num_devices": 2} if half else {}
    )
    simulation = simulate(build(name, given, **settings), data, **options)
    state = simulation.init()
    state = state if start is None else state._replace(server=start)
    expected, clients = on_host(state)
    own = {client_id: row(clients[role], i)["params"] for role, i, client_id, _ in clients_of(data)}
    after = []
    for round in range(ROUNDS):
        state, info = simulation.round(state, round)
        got, clients = on_host(state)
        after.append(clients)
        sent = []
        for role, i, client_id, index in clients_of(data):
            if i in np.asarray(info.participants[role]):
                key = client_round_key(run_key, round, client_id)
                order = list(batches(data, round, client_id, index))
                local = Local(role, key, examples(data, index), order)
                own[client_id], upload = client(expected, own[client_id], local)
                sent.append(Sent(role, len(index) if half else 1, upload))
            assert_trees_close(row(clients[role], i), {"params": own[client_id]})
        assert len(sent) == (3 if half else 5)
        expected = server(expected, sent, server_round_key(run_key, round))
        assert_trees_close(got, expected)
    return after[0]


def trained(params, data):
    """``params`` after a step of SGD on the cross-entropy of each batch."""
    for x, y in data:
        params = step(params, gradient(params, x, y))
    return params


def weighted(sent):
    """The mean of what was sent by its weights."""
    weights = [one.weight for one in sent]
    return combine(
        lambda *leaves: np.average(leaves, axis=0, weights=weights), *(one.upload for one in sent)
    )


@functools.cache
def public_images():
    """All public images ``[P, D]``."""
    images = np.asarray(federation().public.images, np.float64) / 127.5 - 1
    return images.reshape(len(images), -1)


def towards(params, answers, key, steps, d_loss):
    """``params`` after so many public batches, ``d_loss(logits, answers)`` by the logits."""
    x = public_images()
    order = np.asarray(shuffled(for_purpose(key, Purpose.PUBLIC_BATCHES), len(x), len(x)))
    for batch in range(steps):
        i = order[(batch * PUBLIC_BATCH + np.arange(PUBLIC_BATCH)) % len(x)]
        d_logits = d_loss(forward(params, x[i])[1], answers[i])
        params = step(params, backward(params, x[i], d_logits))
    return params


def d_absolute(logits, answers):
    """Derivative by the logits of the mean over batch and classes of |logits - answers|."""
    return np.sign(logits - answers) / logits.size


@functools.cache
def alone():
    """All clients' states, as small ones, before and after each round of local training."""
    return [
        state.clients["small"] for state in rounds_of("local", 2, federation(0), one_width())[1]
    ]


def check_first_round(clients):
    """That the small clients have trained as if alone."""
    assert_trees_close(clients["small"], row(alone()[1], [0, 2, 4]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting"), [("fedmd", "digest_epochs"), ("fedproto", "lam")])
def test_local_training_where_nothing_is_learnt_from_others(name, setting):
    """With this setting 0, in every round; else in the first, as is checked below."""
    states = rounds_of(name, 2, federation(0), one_width(public=PUBLIC), **{setting: 0})[1]
    for got, expected in zip(states, alone(), strict=True):
        assert_trees_close(got.clients["small"], expected)


@pytest.mark.slow
@WHO
def test_fedmd(half):
    """A step on |f_i - consensus| per public batch, then on CE; consensus <- mean_i f_i(x_p)."""

    def client(consensus, w, local):
        if consensus.known:
            w = towards(w, consensus.logits, local.key, 2 * 4, d_absolute)  # 4 batches hold all 10
        w = trained(w, local.batches)
        return w, forward(w, public_images())[1]

    def server(consensus, sent, key):
        return Consensus(weighted(sent), np.True_)

    first = compare("fedmd", client, server, with_public(), half, digest_epochs=2)
    if not half:
        check_first_round(first)


def test_what_answers_so_already_learns_nothing():
    """Answers are learnt by the function that gives them, running statistics and all."""
    model, public = tiny_model(CLASSES), PublicPool(jnp.asarray(tiny_public().images), None, None)
    given = setup(public=PUBLIC, public_batch_size=PUBLIC_BATCH)
    variables = model.init(jax.random.key(0), tiny_public().images.shape[1:])
    stats = {"mean": jnp.linspace(-2.0, 3.0, 4), "var": jnp.linspace(0.1, 0.5, 4)}
    variables = jax.tree.map(lambda leaf: leaf.astype(float), variables | {"batch_stats": stats})
    answers = public_logits(given, model, variables, public)
    # Not FedMD's distance, whose gradient is as large for rounding as for anything.
    learnt = learn_answers(
        given,
        model,
        jax.random.key(1),
        variables,
        public._replace(answers=answers),
        5,
        losses.distillation_loss,
    )
    assert_trees_close(learnt, variables)


@pytest.mark.slow
def test_feddf():
    """w_role <- mean of its uploads, then steps on KL(softmax(mean_i f_i) || softmax(f_role))."""

    def client(w, own, local):
        own = trained(w[local.role]["params"], local.batches)
        return own, own

    def server(w, sent, key):
        answers = np.mean([forward(one.upload, public_images())[1] for one in sent], axis=0)
        means = {role: weighted([one for one in sent if one.role == role]) for role in w}
        return {
            role: {"params": towards(mean, answers, key, 5, d_divergence)}
            for role, mean in means.items()
        }

    compare("feddf", client, server, with_public(), half=True, server_steps=5)


@pytest.mark.slow
def test_feddf_without_distillation_averages_within_each_role():
    """With server_steps = 0."""
    for state in rounds_of("feddf", 2, federation(), with_public(), server_steps=0)[1][1:]:
        for role, clients in state.clients.items():
            means = combine(lambda leaf: leaf.mean(axis=0), clients["params"])
            assert_trees_close(state.server[role]["params"], means)


@pytest.mark.parametrize("name", ["fedmd", "feddf"])
def test_refused_without_public_images(name):
    assert "public.name" in refusal(lambda: build(name, setup(public=None)))


def means_of(features, y):
    """Mean feature of each class, zeros where there is none, and how many examples each has."""
    counts = np.bincount(y, minlength=CLASSES).astype(float)
    means = [
        features[y == c].mean(axis=0) if counts[c] else np.zeros(WIDTH) for c in range(CLASSES)
    ]
    return Prototypes(np.array(means), counts)


def averaged(kept, uploads):
    """P_c <- sum_i n_ic P_ic / sum_i n_ic; where nobody has an example the class keeps its own."""
    means, counts = kept.means.copy(), kept.counts.copy()
    for c in range(CLASSES):
        total = sum(upload.counts[c] for upload in uploads)
        if total:
            means[c] = sum(upload.counts[c] * upload.means[c] for upload in uploads) / total
            counts[c] = total
    return Prototypes(means, counts)


@pytest.mark.slow
@WHO
def test_fedproto(half):
    """Steps on CE + lambda |z - P_y|^2 / D, the second where there is a P_y; then class means."""
    lam = 0.7

    def client(prototypes, w, local):
        for x, y in local.batches:
            z, logits = forward(w, x)
            known = (prototypes.counts[y] > 0)[:, None]
            d_features = lam * 2 * known * (z - prototypes.means[y]) / WIDTH / len(x)
            w = step(w, backward(w, x, d_cross_entropy(logits, y), d_features))
        x, y = local.examples
        return w, means_of(forward(w, x)[0], y)

    def server(prototypes, sent, key):
        return averaged(prototypes, [one.upload for one in sent])

    some = Prototypes(np.full((CLASSES, WIDTH), 0.3), np.array([1.0, 0.0, 2.0, 0.0]))
    start = some if half else None  # so that a batch has classes with a prototype and without
    first = compare("fedproto", client, server, one_width(), half, start, lam=lam)
    if not half:
        check_first_round(first)


HEAD = {"server_epochs": 2, "server_learning_rate": RATE}


def head_trained(head, uploads):
    """Steps along the sum of the gradients of CE(head(P_ic), c) over all that have class c."""
    sent = [(u.means[c], c) for u in uploads for c in range(CLASSES) if u.counts[c]]
    p, c = (np.array(column) for column in zip(*sent, strict=True))
    for _ in range(HEAD["server_epochs"]):
        d_logits = softmax(p @ head["kernel"] + head["bias"]) - np.eye(CLASSES)[c]
        head = step(head, {"kernel": p.T @ d_logits, "bias": d_logits.sum(axis=0)})
    return head


def test_fedgh():
    """Head from the server, steps on CE, class means; the server's head learns from these."""

    def client(head, w, local):
        w = trained({"features": w["features"], "head": head}, local.batches)
        x, y = local.examples
        return w, means_of(forward(w, x)[0], y)

    def server(head, sent, key):
        return head_trained(head, [one.upload for one in sent])

    compare("fedgh", client, server, one_width(), half=True, **HEAD)


@pytest.mark.parametrize(
    ("name", "settings", "start", "expected"),
    [
        ("fedproto", {}, lambda *kept: Prototypes(*kept), averaged),
        (
            "fedgh",
            HEAD,
            lambda means, counts: {"kernel": means.T, "bias": counts},
            head_trained,
        ),
    ],
    ids=["fedproto", "fedgh"],
)
def test_only_class_means_that_were_sent_count(name, settings, start, expected):
    """Neither those of absent clients, nor of classes without examples; weights only say who is."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4, CLASSES, WIDTH))
    counts = np.array([[3.0, 0, 0, 1], [5, 6, 7, 8], [2, 0, 0, 4], [9, 9, 0, 0]])
    means[counts == 0] = 0
    uploads = [Prototypes(*pair) for pair in zip(means, counts, strict=True)]
    kept = start(rng.normal(size=(CLASSES, WIDTH)), np.array([2.0, 0.0, 5.0, 1.0]))
    aggregate = jax.jit(build(name, one_width(), **settings).aggregate)
    got = aggregate(
        kept,
        {"small": Prototypes(means[:3], counts[:3]), "large": Prototypes(means[3:], counts[3:])},
        {"small": np.array([1, 0, 6]), "large": np.array([9])},
        None,
    )
    assert_trees_close(got, expected(kept, [uploads[i] for i in (0, 2, 3)]))
    if name == "fedproto":
        np.testing.assert_array_equal(got.means[2], kept.means[2])


@pytest.mark.parametrize("name", ["fedproto", "fedgh"])
def test_refused_where_features_differ_in_width(name):
    message = refusal(lambda: build(name, setup()))
    assert "model.small" in message
    assert "model.large" in message


def test_class_means():
    """Of every client's training examples; zeros where it lacks a class, as one of them does."""
    data, given = federation(), one_width()
    variables = given.models["small"].init(jax.random.key(1), given.sample_shape)
    measure = jax.jit(lambda own: class_means(given, given.models["small"], variables, own))
    names = {group.role: group.names for group in data.groups}
    tables = {group.role: group.train for group in data.groups}
    lacking = set()
    for role, i, _, index in clients_of(data):
        got = measure(ClientData(data.pool, data.public, *row(tables[role], i)))
        x, y = examples(data, index)
        assert_trees_close(got, means_of(forward(on_host(variables["params"]), x)[0], y))
        lacking |= {(names[role][i], int(c)) for c in np.flatnonzero(got.counts == 0)}
    assert set(ABSENT.items()) <= lacking


def masks_of(side):
    """A setup whose features are the image itself, and a client with four of five such images."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, size=(5, 4, 4, 3), dtype=np.uint8)
    masks = rng.integers(0, 2, size=(5, side, side), dtype=np.uint8)
    variables = {"params": {"features": {}, "head": {}}, "batch_stats": {}}
    model = Model(
        lambda key, shape: variables, lambda variables, x, *, train, mask=None: (x, {}), linear
    )
    given = setup(
        task=segmentation(("lesion",)),
        num_classes=1,
        sample_shape=(4, 4, 3),
        models=dict.fromkeys(("small", "large"), model),
        batch_size=3,
    )
    index = np.array([4, 0, 3, 1, 2, 2], np.int32)  # the last two are no example of the client's
    pool = Pool(jnp.asarray(images), jnp.asarray(masks))
    own = ClientData(pool, None, jnp.asarray(index), jnp.int32(4))
    got = jax.jit(lambda data: class_means(given, model, variables, data))(own)
    return given, images[index[:4]] / 127.5 - 1, masks[index[:4]], got


def test_class_means_of_masks():
    """Every pixel is an example of its class, an image's pixels counting as one together."""
    _, images, masks, got = masks_of(4)
    sums, pixels = np.zeros((2, 3)), np.zeros(2)
    for place, c in np.ndenumerate(masks):
        sums[c] += images[place]
        pixels[c] += 1
    assert_trees_close(got, Prototypes(sums / pixels[:, None], pixels / 16))


def test_class_means_of_masks_finer_than_the_features():
    """Memberships of a place add up to 1, masked examples have none, and no pixel is lost."""
    given, images, masks, got = masks_of(8)
    present = np.array([True, True, False, True])
    members = members_of(given, Batch(images, masks, present), images)
    assert members.shape == (4, 4, 4, 2)
    assert (np.min(members) >= 0) and np.any((members > 0.1) & (members < 0.9))
    np.testing.assert_allclose(members.sum(axis=-1), present[:, None, None] * np.ones((4, 4, 4)))
    np.testing.assert_allclose(got.counts.sum(), 4)
    np.testing.assert_allclose(got.counts @ got.means, images.mean(axis=(1, 2)).sum(axis=0))
