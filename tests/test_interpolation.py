"""Tests the models between a client's own and the broadcast one."""

import jax
import numpy as np
import pytest
from helpers import (
    CLASSES,
    PUBLIC,
    build,
    refusal,
    row,
    simulate,
    tiny_federation,
    tiny_model,
    tiny_public,
    tiny_setup,
)

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.algorithms.interpolation import with_interpolated
from fedhelp_jax.experiments import config as config_lib
from fedhelp_jax.models.model import apply_model

PARTS = (0.25, 0.5)


def simulation_of(name, parts):
    public = PUBLIC if ALGORITHMS[name].uses_public else None
    algorithm = with_interpolated(build(name, tiny_setup(public=public)), parts)
    data = tiny_federation(public=tiny_public() if public else None)
    return simulate(algorithm, data)


@pytest.mark.parametrize("name", ["fedhelp", "fedavg"])
def test_models_lie_between_a_clients_own_and_the_broadcast_one(name):
    simulation = simulation_of(name, PARTS)
    state, _ = simulation.round(simulation.init(), 0)
    client = simulation.phases.algorithm.clients["small"]
    download = simulation.phases.algorithm.download(state.server, "small")
    deployed = client.deploy(download, row(state.clients["small"], 0), None)
    assert list(deployed) == list(client.models)
    assert list(deployed)[-2:] == ["between_0.25", "between_0.5"]
    for part in PARTS:
        expected = jax.tree.map(
            lambda own, broadcast, a=part: (1 - a) * own + a * broadcast,
            deployed["personal"],
            deployed["global"],
        )
        jax.tree.map(np.testing.assert_allclose, deployed[f"between_{part}"], expected)
    results = simulation.evaluate(state, "test")["small"]
    assert set(results) == set(client.models)
    logits, _ = apply_model(
        client.models["between_0.5"], deployed["between_0.5"], np.zeros((2, 8, 8, 3), np.float32)
    )
    assert logits.shape == (2, CLASSES)


def test_networks_of_two_architectures_have_none_between():
    before = simulation_of("fedhelp", ()).phases.algorithm.clients["large"]
    after = simulation_of("fedhelp", PARTS).phases.algorithm.clients["large"]
    assert list(before.models) == list(after.models) == ["large", "global"]


def test_training_is_as_without():
    plain, more = simulation_of("fedavg", ()), simulation_of("fedavg", PARTS)
    states = [simulation.round(simulation.init(), 0)[0] for simulation in (plain, more)]
    jax.tree.map(np.testing.assert_array_equal, *(state.server for state in states))


def test_parts_are_refused_outside_of_0_and_1():
    fedavg = ALGORITHMS["fedavg"]
    assert fedavg(small=tiny_model(CLASSES), interpolate=[0.5]).interpolate == (0.5,)
    assert "interpolate" in refusal(
        lambda: fedavg(small=tiny_model(CLASSES), interpolate=[0.5, 1.0])
    )
    config = config_lib.default_config()
    for wrong in ((0.0,), (0.5, 0.5)):
        config.interpolate = wrong
        assert "config.interpolate" in refusal(lambda: config_lib.validate(config))
