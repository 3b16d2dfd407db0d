"""Tests the measurement of a small client's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CLASSES,
    PUBLIC,
    SIZE,
    assert_trees_close,
    build,
    on_host,
    refusal,
    simulate,
    tiny_federation,
    tiny_public,
    tiny_setup,
)

from benchmarks.gradients import fedhelp_measured, gradients
from fedhelp_jax.algorithms.base import PublicSpec
from fedhelp_jax.algorithms.fedhelp import Broadcast, SmallState
from fedhelp_jax.algorithms.fedhelp_losses import FedHelpSettings
from fedhelp_jax.data.federation import ClientData, Pool, PublicPool

pytestmark = pytest.mark.usefixtures("float64")


def client(public_labels):
    """A client whose private images are the public ones, and whose heads are the same."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, CLASSES, 12))
    setup = tiny_setup(public=PublicSpec(12, CLASSES, None, shared=False))
    variables = setup.models["small"].init(jax.random.key(1), setup.sample_shape)
    # Padding and another client's images must not count.
    pool = Pool(jnp.concatenate([images, 255 - images]), jnp.concatenate([labels, labels]))
    index = jnp.concatenate([jnp.arange(12), jnp.full(5, 20)])
    public = PublicPool(images, public_labels(labels), None)
    state = SmallState(variables, {"labels": variables["params"]["head"]})
    data = ClientData(pool=pool, index=index, size=jnp.int32(12), public=public)
    return setup, FedHelpSettings(), Broadcast(variables, jnp.int32(0)), state, data


def test_the_same_images_and_labels_pull_alike():
    found = gradients(*client(lambda labels: labels))
    assert found["cosine"] == pytest.approx(1, abs=1e-9)
    assert found["ratio"] == pytest.approx(1, abs=1e-9)
    assert -1 < found["cosine_halves"] < 0.99


def test_other_labels_pull_elsewhere():
    assert gradients(*client(lambda labels: (labels + 1) % CLASSES))["cosine"] < 0.9


def test_measuring_changes_nothing_of_training():
    federation = tiny_federation(public=tiny_public())
    setup = tiny_setup(public=PUBLIC)
    plain = simulate(build("fedhelp", setup), federation)
    measured = simulate(fedhelp_measured.build(setup, FedHelpSettings()), federation)
    states = [plain.init(), measured.init()]
    for round in range(2):
        states[0], _ = plain.round(states[0], round)
        states[1], info = measured.round(states[1], round)
    assert_trees_close(*map(on_host, states))
    of_each = info.info["small"]
    assert (abs(of_each["cosine"]) <= 1).all() and (of_each["ratio"] > 0).all()


def test_without_public_images_there_is_nothing_to_measure():
    said = refusal(lambda: fedhelp_measured.build(tiny_setup(), FedHelpSettings()))
    assert "needs public images" in said
