"""Probes, FedNCM and FedPFT against NumPy and SciPy in float64, and who may see whose images."""

import functools
import sys

import jax
import numpy as np
import pytest
from helpers import CLASSES, on_host, refusal, tiny_dataset, tiny_federation
from numpy_network import clients_of, examples, rounds_of
from scipy import optimize, special

from fedhelp_jax.algorithms.fedpft import draw
from fedhelp_jax.algorithms.prototypes import Prototypes
from fedhelp_jax.data.federation import make_federation
from fedhelp_jax.data.types import image_sha256
from fedhelp_jax.settings.schema import TeacherConfig
from fedhelp_jax.teachers.base import check_public, own_images
from fedhelp_jax.teachers.resolve import own_answers

pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def run_of(name, rounds=2, **settings):
    return rounds_of(name, rounds, tiny_federation(), **settings)


def fitted(x, y, l2):
    """The weights ``[D + 1, C]`` that minimise mean CE + l2/2 |W|^2, by SciPy."""
    targets = np.eye(CLASSES)[y]

    def loss(flat):
        w = flat.reshape(-1, CLASSES)
        log_probs = special.log_softmax(x @ w[:-1] + w[-1], axis=1)
        error = (np.exp(log_probs) - targets) / len(x)
        slope = np.vstack([x.T @ error + l2 * w[:-1], error.sum(0)])
        return -np.sum(targets * log_probs) / len(x) + l2 / 2 * np.sum(w[:-1] ** 2), slope.ravel()

    start = np.zeros((x.shape[1] + 1) * CLASSES)
    options = {"maxiter": 5000, "gtol": 1e-10, "ftol": 1e-16}
    return optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)


@pytest.mark.parametrize("name", ["pixel_probe", "foundation_probe"])
def test_a_probe_is_the_logistic_regression_of_a_clients_own_images(name):
    data = tiny_federation()
    simulation, states = run_of(name, l2=0.1)
    for role, i, _, index in clients_of(data):
        x, y = examples(data, index)
        deviation = x.std(0)
        x = (x - x.mean(0)) / np.where(deviation > 0, deviation, 1)
        expected = fitted(x, y, 0.1)
        w = expected.x.reshape(-1, CLASSES)
        for state in states[1:]:
            head = {k: v[i] for k, v in state.clients[role]["params"]["head"].items()}
            np.testing.assert_allclose(head["kernel"], w[:-1], atol=1e-4)
            # The bias is not regularised: it has no optimum for a client with a single class.
            logits = x @ head["kernel"] + head["bias"]
            np.testing.assert_allclose(
                special.softmax(logits, 1), special.softmax(x @ w[:-1] + w[-1], 1), atol=1e-4
            )


def standardised(values):
    centred = values - values.mean(1, keepdims=True)
    return centred / values.std(1, keepdims=True)


def test_fedncm_answers_the_class_with_the_nearest_mean():
    data = tiny_federation()
    simulation, states = run_of("fedncm")
    x, y = examples(data, np.concatenate([index for *_, index in clients_of(data)]))
    x = standardised(x)
    means = np.stack([x[y == c].mean(0) for c in range(CLASSES)])
    head = states[-1].server["params"]["head"]
    np.testing.assert_allclose(head["kernel"], means.T, atol=1e-10)
    asked = np.random.default_rng(0).normal(size=(50, x.shape[1]))
    nearest = ((asked[:, None] - means) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal((asked @ head["kernel"] + head["bias"]).argmax(1), nearest)


def test_a_class_that_nobody_has_is_never_answered():
    clients = (("a", 6, 2, 2), ("b", 6, 2, 2))
    dataset = tiny_dataset(clients)
    labels = np.where(dataset.labels == 0, 1, dataset.labels)
    data = make_federation(dataset._replace(labels=labels), ("small", "large"))
    _, states = rounds_of("fedncm", 1, data)
    head = states[-1].server["params"]["head"]
    assert np.isfinite(head["bias"]).all() and head["bias"][0] < head["bias"][1:].min() - 1e5


def test_fedpft_fits_a_head_to_draws_from_the_classes_of_each_client(monkeypatch):
    drawn = []

    def spy(key, sent, squares, count):
        features, labels = draw(key, sent, squares, count)
        jax.debug.callback(lambda *found: drawn.append(on_host(found)), features, labels)
        jax.debug.callback(lambda *found: drawn.append(on_host(found)), sent, squares)
        return features, labels

    monkeypatch.setattr(sys.modules["fedhelp_jax.algorithms.fedpft"], "draw", spy)
    data = tiny_federation()
    _, states = rounds_of("fedpft", 1, data, l2=0.1, draws=60)
    jax.effects_barrier()
    (x, y), (sent, squares) = sorted(drawn, key=lambda found: isinstance(found[0], tuple))
    clients = sorted(clients_of(data), key=lambda client: client[0])  # as in the uploads, by role
    for i, (*_, index) in enumerate(clients):
        own, labels = examples(data, index)
        own = standardised(own)
        np.testing.assert_array_equal(sent.counts[i], np.bincount(labels, minlength=CLASSES))
        for c in np.unique(labels):
            np.testing.assert_allclose(sent.means[i, c], own[labels == c].mean(0), atol=1e-10)
            np.testing.assert_allclose(squares[i, c], (own[labels == c] ** 2).mean(0), atol=1e-10)
    head = states[-1].server["params"]["head"]
    w = fitted(x, y, 0.1).x.reshape(-1, CLASSES)
    np.testing.assert_allclose(head["kernel"], w[:-1], atol=1e-4)


def test_draws_have_the_shares_means_and_variances_that_were_sent():
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(3, 2, 4)), rng.uniform(0.5, 2, size=(3, 2, 4))
    counts = np.array([[1.0, 0.0], [2.0, 3.0], [0.0, 4.0]])
    means += 100 * np.arange(6).reshape(3, 2, 1)  # so that each draw tells where it is from
    squares = means**2 + deviations**2
    x, y = draw(jax.random.key(0), Prototypes(means, counts), squares, 40_000)
    origin = np.rint(np.asarray(x).mean(1) / 100).astype(int)
    np.testing.assert_array_equal(y, origin % 2)
    for i, share in enumerate(counts.ravel() / counts.sum()):
        own = np.asarray(x)[origin == i]
        assert len(own) / len(x) == pytest.approx(share, abs=0.01)
        if len(own):
            np.testing.assert_allclose(own.mean(0), means.reshape(-1, 4)[i], atol=0.15)
            np.testing.assert_allclose(own.std(0), deviations.reshape(-1, 4)[i], rtol=0.05)


def test_the_federated_probe_is_fedavg_of_a_linear_head():
    simulation, states = run_of("federated_probe")
    first, then = (s.server.variables["params"]["head"]["kernel"] for s in states[:2])
    assert not first.any() and then.any()
    uploads = [states[1].clients[role]["params"]["head"]["kernel"] for role in ("small", "large")]
    np.testing.assert_allclose(then, np.concatenate(uploads).mean(0), atol=1e-12)


# --- whose images a model may see -----------------------------------------------------------------


def own():
    return own_images(tiny_dataset())


def test_own_images_are_the_distinct_images_of_all_clients():
    dataset = tiny_dataset()
    images = dataset.images.copy()
    images[1] = images[0]
    found = own_images(dataset._replace(images=images))
    assert len(found) == len(images) - 1
    assert list(found.sha256) == [image_sha256(image) for image in found.pixels]
    some = found.take([3, 0])
    assert some.sha256 == (found.sha256[3], found.sha256[0])
    np.testing.assert_array_equal(some.pixels[1], images[0])
    assert some.shapes == [images.shape[1:]] * 2
    assert "8-bit" in refusal(lambda: own_images(dataset._replace(images=images.astype(float))))


def test_own_images_may_not_be_sent():
    with pytest.raises(TypeError, match="OwnImages"):
        check_public(own())


@pytest.mark.parametrize("name", ["simulated", "stored", "open_inference", "hf_zero_shot", "none"])
def test_a_model_elsewhere_is_refused(name):
    message = refusal(lambda: own_answers(TeacherConfig(name=name), tiny_dataset()))
    assert "private images" in message and "litert, onnx" in message
