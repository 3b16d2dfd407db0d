"""Uploads that are not finite have no influence; clients that diverged are named and counted."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CLASSES,
    CLIENTS,
    PUBLIC,
    assert_trees_close,
    assert_trees_equal,
    build,
    on_host,
    simulate,
    tiny_federation,
    tiny_model,
    tiny_public,
    tiny_setup,
)

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.divergence import NON_FINITE, Divergence, NonFinite
from fedhelp_jax.phases import server_part

two_devices = pytest.mark.skipif(len(jax.devices()) < 2, reason="there is only one device")
NAMES = {"small": ("village", "coast", "north"), "large": ("big", "town")}
# Who sends nothing, so that nothing can be left out.
SILENT = ("centralized", "local")


@functools.cache
def federation():
    return tiny_federation(public=tiny_public())


def algorithm(name):
    settings = {"kd_warmup_rounds": 0} if name == "fedhelp" else {}
    # Some methods need features of one width.
    models = {"small": tiny_model(CLASSES), "large": tiny_model(CLASSES)}
    return build(name, tiny_setup(public=PUBLIC, models=models), **settings)


# By which a client is known in its update: no two have as many.
SIZES = {name: train for name, train, _, _ in CLIENTS}


def place(name):
    """A client's role and row."""
    for group in federation().groups:
        if name in group.names:
            return group.role, group.names.index(name)
    raise AssertionError(name)


def poisoned(method, names, value=np.nan):
    """The method, with uploads of some clients that hold one such value in every leaf."""
    sizes = np.array([SIZES[name] for name in names])

    def client(own):
        def update(key, download, state, data):
            state, upload, info = own.update(key, download, state, data)
            bad = jnp.any(data.size == sizes)

            def poison(leaf):
                return jnp.where(bad, leaf.at[(0,) * leaf.ndim].set(value), leaf)

            return state, jax.tree.map(poison, upload), info

        return own._replace(update=update)

    return method._replace(clients={role: client(own) for role, own in method.clients.items()})


def everyone():
    return [name for group in federation().groups for name in group.names]


def after_a_round(method, **options):
    simulation = simulate(method, federation(), **options)
    state, info = simulation.round(simulation.init(), 0)
    return on_host(state), on_host(info)


def without(method, names):
    """The state after a round in which these clients' finite uploads have weight 0."""
    simulation = simulate(method._replace(mean_only=False), federation())
    state, phases, data = simulation.init(), simulation.phases, simulation.federation
    at = simulation.run_key, jnp.int32(0), data

    @jax.jit
    def one_round(state):
        trained = {r: phases.train(r, state.clients[r], state.server, *at) for r in state.clients}
        for name in names:
            role, row = place(name)
            weight = trained[role].weight.at[row].set(0)
            trained[role] = trained[role]._replace(weight=weight)
        return phases.aggregate(state, server_part(trained), *at)

    return on_host(one_round(state))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n not in SILENT])
def test_an_upload_that_is_not_finite_has_no_influence_in_any_method(name):
    """One client's upload is NaN, one's infinite; the others' mean is taken without them."""
    bad = ["coast", "big"]
    method = algorithm(name)
    value = {"coast": np.nan, "big": np.inf}
    state, info = after_a_round(
        functools.reduce(lambda m, n: poisoned(m, [n], value[n]), bad, method)
    )
    assert_trees_close(state, without(method, bad))
    for role, found in info.non_finite.items():
        names = next(g.names for g in federation().groups if g.role == role)
        np.testing.assert_array_equal(found.upload, [n in bad for n in names])
        assert not found.loss.any()
        assert not found.state.any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "feddf", "fedmd", "fedgh", "fedkd"])
def test_the_server_keeps_what_it_had_if_nothing_it_gets_is_finite(name):
    method = poisoned(algorithm(name), everyone())
    simulation = simulate(method, federation())
    before = on_host(simulation.init())
    assert_trees_equal(after_a_round(method)[0].server, before.server)


@pytest.mark.usefixtures("float64")
def test_a_role_without_a_finite_upload_keeps_its_model_in_feddf():
    """As starting point of the distillation, which the other role's uploads then teach."""
    method = build("feddf", tiny_setup(public=PUBLIC), server_steps=0)
    role, _ = place("big")
    names = next(g.names for g in federation().groups if g.role == role)
    simulation = simulate(method, federation())
    before = on_host(simulation.init())
    state, _ = after_a_round(poisoned(method, names))
    assert_trees_equal(state.server[role], before.server[role])
    other = "small" if role == "large" else "large"
    assert_trees_close(state.server[other], without(method, names).server[other])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["fedavg", "fedproto"])
@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 2},
        {"chunk_size": 0},
        {"pool_bytes": 12000},
        pytest.param({"num_devices": 2}, marks=two_devices),
        pytest.param({"num_devices": 2, "private": True}, marks=two_devices),
    ],
    ids=str,
)
def test_however_clients_are_mapped(name, options):
    """Of a method that needs only the mean, and of one that is given every upload."""
    bad = ["coast", "big"]
    method = poisoned(algorithm(name), bad)
    expected, expected_info = after_a_round(method)
    state, info = after_a_round(method, **options)
    assert_trees_close(state.server, expected.server)
    for group in federation().groups:
        found = {
            group.names[slot]
            for slot, is_bad in zip(
                info.participants[group.role], info.non_finite[group.role].upload, strict=True
            )
            if is_bad
        }
        assert found == set(bad) & set(group.names)


@pytest.mark.parametrize("what", ["state", "loss"])
def test_states_and_losses_that_are_not_finite_are_found(what):
    method = algorithm("local")

    def client(own):
        def update(key, download, state, data):
            state, upload, info = own.update(key, download, state, data)
            spoil = jnp.where(data.size == SIZES["town"], jnp.inf, 0.0)
            if what == "loss":
                info = {**info, "loss": info["loss"] + spoil}
            else:
                state = jax.tree.map(lambda leaf: leaf + spoil, state)
            return state, upload, info

        return own._replace(update=update)

    clients = {role: client(own) for role, own in method.clients.items()}
    simulation = simulate(method._replace(clients=clients), federation())
    state, info = simulation.round(simulation.init(), 0)
    role, row = place("town")
    for group in federation().groups:
        for kind, found in info.non_finite[group.role]._asdict().items():
            expected = np.arange(len(group.names)) == row
            expected &= kind == what and group.role == role
            np.testing.assert_array_equal(np.asarray(found), expected, err_msg=kind)
    if what == "state":
        results = simulation.evaluate(state, "test")[role]["large"]
        assert results[NON_FINITE].tolist() == [
            int(size) if i == row else 0
            for i, size in enumerate(
                next(g for g in federation().groups if g.role == role).test.size
            )
        ]
        assert results["accuracy"][row] == 0


# --- on the host ---


def found(**bad):
    none = {role: NonFinite(*np.zeros((3, len(names)), bool)) for role, names in NAMES.items()}
    for role, kinds in bad.items():
        none[role] = none[role]._replace(**{k: np.array(v) for k, v in kinds.items()})
    return none


ALL = {"small": [0, 1, 2], "large": [0, 1]}


def test_a_client_is_told_once_and_counts_until_it_trains_again(caplog):
    health = Divergence(NAMES)
    with caplog.at_level(logging.WARNING):
        bad = found(small={"loss": [0, 1, 0], "upload": [0, 1, 1]})
        left_out = health.trained(3, ALL, jax.tree.map(lambda x: x.astype(bool), bad))
    assert left_out == {"small": 2, "large": 0}
    assert health.clients == {"small": ["coast", "north"], "large": []}
    (told,) = caplog.messages
    assert "round 3" in told
    assert "small coast (loss, upload), small north (upload)" in told
    caplog.clear()
    # coast takes no part, north is well again.
    slots = {"small": [0, 2, 3], "large": [0, 1]}
    health.trained(4, slots, found())
    assert health.clients == {"small": ["coast"], "large": []}
    assert not caplog.messages
    assert health.count == 1


def test_a_slot_for_nobody_says_nothing():
    health = Divergence(NAMES, warns=False)
    slots = {"small": [1, 3, 3], "large": [0, 1]}
    bad = found(small={"upload": np.array([False, True, True])})
    assert health.trained(1, slots, bad) == {"small": 0, "large": 0}
    assert health.count == 0


def test_logits_that_are_not_finite_are_told_by_round_role_client_and_model(caplog):
    health = Divergence(NAMES)
    with caplog.at_level(logging.WARNING):
        health.measured(
            "round 7, validation",
            {
                "small": {"personal": {NON_FINITE: [0, 4, 0]}, "global": {NON_FINITE: [0, 0, 0]}},
                "large": {"large": {NON_FINITE: [0, 0]}, "global": {NON_FINITE: [2, 0]}},
            },
        )
    (told,) = caplog.messages
    assert "round 7, validation" in told
    assert "small coast (personal), large big (global)" in told
    # What is only reported beside the deployed model makes nobody diverged.
    assert health.clients == {"small": ["coast"], "large": []}


def test_a_role_of_which_all_diverged_has_no_scores():
    health = Divergence(NAMES, {"large": ["big", "town"], "small": ["coast"]}, warns=False)
    assert health.lost_roles == ["large"]
    scores = health.scores({"small": [0.1, 0.0, 0.3], "large": [0.5, 0.5]})
    assert scores["small"] == [0.1, 0.0, 0.3]
    assert np.isnan(scores["large"]).all()
