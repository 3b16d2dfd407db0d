"""Uploads that are not finite have no influence; clients that diverged are named and counted."""

import dataclasses
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
from marks import two_devices

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.simulation.divergence import NON_FINITE, Divergence, NonFinite, quarantine
from fedhelp_jax.simulation.round import server_part

NAMES = {"small": ("village", "coast", "north"), "large": ("big", "town")}
# Who sends nothing, so that nothing can be left out.
SILENT = ("centralized", "local", "pixel_probe", "foundation_probe")


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


def poisoned(method, values):
    """The method, with a value by name added to every leaf of these clients' uploads."""
    sizes = np.array([SIZES[name] for name in values])

    def client(own):
        def update(key, download, state, data):
            state, upload, info = own.update(key, download, state, data)
            of_this = jnp.where(data.size == sizes, jnp.array(list(values.values())), 0).sum()

            def poison(leaf):
                return leaf.at[(0,) * leaf.ndim].add(of_this.astype(leaf.dtype))

            return state, jax.tree.map(poison, upload), info

        return own._replace(update=update)

    return method._replace(clients={role: client(own) for role, own in method.clients.items()})


def pairs(first, second):
    return zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)


def names_of(role):
    return next(group.names for group in federation().groups if group.role == role)


def after_a_round(method, **options):
    simulation = simulate(method, federation(), **options)
    state, info = simulation.round(simulation.init(), 0)
    return on_host(state), on_host(info)


def rounds_of(method):
    """A round from the first state, by what is added to uploads and whose weight becomes 0.

    It is one program, which compiles once: ``(values by name, names) -> (state, non_finite)``.
    """
    # Every upload's weight is seen here; of a mean only, they are summed up while clients run.
    method = method._replace(mean_only=False)
    simulation = simulate(method, federation())
    state, at = simulation.init(), (simulation.run_key, jnp.int32(0), simulation.federation)
    everyone = [name for group in federation().groups for name in group.names]

    @jax.jit
    def one_round(values, kept):
        phases = dataclasses.replace(simulation.phases, algorithm=poisoned(method, values))
        trained = {r: phases.train(r, state.clients[r], state.server, *at) for r in state.clients}
        for name in everyone:
            role, row = place(name)
            weight = trained[role].weight.at[row].multiply(kept[name])
            trained[role] = trained[role]._replace(weight=weight)
        found = {role: t.non_finite for role, t in trained.items()}
        return phases.aggregate(state, server_part(trained), *at), found

    def run(values, left_out=()):
        added = {name: float(values.get(name, 0)) for name in everyone}
        return on_host(one_round(added, {name: int(name not in left_out) for name in everyone}))

    return run, on_host(state), everyone


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n not in SILENT])
def test_an_upload_that_is_not_finite_has_no_influence_in_any_method(name):
    """The others' mean is taken without it; the server keeps its state if none is finite."""
    run, before, everyone = rounds_of(algorithm(name))
    bad = {"coast": np.nan, "big": np.inf}
    state, found = run(bad)
    assert_trees_equal(state, run({}, left_out=bad)[0])
    for role, of_role in found.items():
        np.testing.assert_array_equal(of_role.upload, [n in bad for n in names_of(role)])
        assert not of_role.loss.any()
        assert not of_role.state.any()
    untouched = run({})[0].server
    assert any((a != b).any() for a, b in pairs(untouched, state.server))
    nothing, _ = run(dict.fromkeys(everyone, np.nan))
    assert_trees_equal(nothing.server, before.server)


@pytest.mark.usefixtures("float64")
def test_a_role_without_a_finite_upload_keeps_its_model_in_feddf():
    """As starting point of the distillation, which the other role's uploads then teach."""
    method = build("feddf", tiny_setup(public=PUBLIC), server_steps=0)
    run, before, _ = rounds_of(method)
    names = names_of("large")
    state, _ = run(dict.fromkeys(names, np.nan))
    assert_trees_equal(state.server["large"], before.server["large"])
    assert_trees_equal(state.server["small"], run({}, left_out=names)[0].server["small"])


# Of methods that need only the mean, and of one that is given every upload.
@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavg", {"chunk_size": 2}),
        ("fedavg", {"max_device_bytes": 12000}),
        pytest.param("fedavg", {"num_devices": 2, "private": True}, marks=two_devices),
        ("fedproto", {"max_device_bytes": 12000}),
        pytest.param("fedproto", {"num_devices": 2}, marks=two_devices),
    ],
    ids=str,
)
def test_however_clients_are_mapped(name, options, expected_states):
    bad = {"coast": np.nan, "big": np.inf}
    state, info = after_a_round(poisoned(algorithm(name), bad), **options)
    assert_trees_close(state.server, expected_states(name).server)
    for group in federation().groups:
        left_out = info.non_finite[group.role].upload
        slots = info.participants[group.role][left_out].tolist()
        assert {group.names[slot] for slot in slots} == set(bad) & set(group.names)


@pytest.fixture(scope="module")
def expected_states():
    """By method, the state after a round in which two clients' uploads have weight 0."""

    @functools.cache
    def expected(name):
        return rounds_of(algorithm(name))[0]({}, left_out=("coast", "big"))[0]

    return expected


@pytest.mark.slow
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


def test_a_relapse_is_told_again(caplog):
    health = Divergence(NAMES)
    bad = {"small": {"personal": {NON_FINITE: [0, 4, 0]}}}
    with caplog.at_level(logging.WARNING):
        for round in (1, 2):
            health.measured(f"round {round}", bad)
            health.trained(round + 1, ALL, found())  # well again
    assert ["round 1" in caplog.messages[0], "round 2" in caplog.messages[1]] == [True, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_server_gets_zeros_for_an_upload_that_is_not_finite(bad):
    """A weight of 0 alone would not do in a server that multiplies by it."""
    upload = {"a": jnp.array([1.0, bad]), "b": jnp.ones(2)}
    found, sent = quarantine({"w": jnp.ones(1)}, upload, {"loss": jnp.float32(1)})
    assert (bool(found.loss), bool(found.state), bool(found.upload)) == (False, False, True)
    assert not np.any(sent["a"]) and not np.any(sent["b"])
