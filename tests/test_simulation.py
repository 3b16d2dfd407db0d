"""How clients are mapped, padded, ordered and chosen changes nothing of what they compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BATCH,
    CLIENTS,
    PUBLIC,
    assert_trees_close,
    assert_trees_equal,
    build,
    differs,
    on_host,
    plain_adam,
    row,
    run,
    simulate,
    tiny_federation,
    tiny_public,
    tiny_setup,
)
from marks import two_devices

from fedhelp_jax.algorithms.aggregation import Averaged
from fedhelp_jax.algorithms.client import ClientData, adam_l2
from fedhelp_jax.core.compilation import compile_totals
from fedhelp_jax.core.random import Purpose, client_round_key, for_purpose
from fedhelp_jax.core.tree import weighted_mean
from fedhelp_jax.data.federation import ClientIndex
from fedhelp_jax.losses import cross_entropy_loss
from fedhelp_jax.models.model import apply_model
from fedhelp_jax.simulation.round import _eval_batch_size

ROUNDS = 2
FLOAT32 = 1e-5  # metrics are computed in float32


# In float32 runs that compute the same drift apart.
pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def federation(top_n=2):
    return tiny_federation(top_n=top_n, public=tiny_public())


def algorithm(name):
    """FedHelp with all its parts on from the first round."""
    settings = {"kd_warmup_rounds": 0, "margin": 0.1} if name == "fedhelp" else {}
    return build(name, tiny_setup(public=PUBLIC), **settings)


def outcome(simulation, state=None, rounds=ROUNDS):
    """What a run leaves on the host: its state, and what each round reported of each client."""
    reports = []
    if state is None:
        state = simulation.init()
    else:
        state = jax.device_put(state, simulation.mapping.replicated)
    for round in range(rounds):
        state, info = simulation.round(state, round)
        reports.append(by_client(simulation, info))
    return on_host(state), reports


def by_client(simulation, info):
    """Reports of a round less the empty slots."""
    return {
        group.role: {
            name: np.array(values)[np.array(info.participants[group.role]) < len(group.names)]
            for name, values in info.info[group.role].items()
        }
        for group in simulation.groups
    }


@functools.cache
def reference():
    """The plainest mapping, one client after the other: its start, its outcome and its metrics."""
    simulation = simulate(algorithm("fedhelp"), federation())
    start = on_host(simulation.init())
    state, reports = outcome(simulation, start)
    return start, (state, reports), on_host(simulation.evaluate(state, "test"))


# --- against loops written here ---


@pytest.mark.slow
def test_a_simulation_is_a_loop_over_clients():
    """Every client by itself, and a NumPy mean of what they send."""
    method, data, run_key = algorithm("fedhelp"), federation(), jax.random.key(0)
    start, (expected, reports), _ = reference()
    server, clients, updates = start.server, {}, {}
    for group in data.groups:
        updates[group.role] = jax.jit(method.clients[group.role].update)
        clients[group.role] = [row(start.clients[group.role], i) for i in range(len(group.names))]
    for round in range(ROUNDS):
        uploads = []
        for group in data.groups:
            for i in range(len(group.names)):
                key = client_round_key(run_key, round, group.ids[i])
                own = ClientData(data.pool, data.public, *row(group.train, i))
                state, upload, info = updates[group.role](
                    key, method.download(server, group.role), clients[group.role][i], own
                )
                clients[group.role][i] = state
                uploads.append(upload)
                assert_trees_close(info, row(reports[round][group.role], i))
        mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *uploads)
        server = server._replace(averaged=Averaged(mean, ()), round=server.round + 1)
    stacked = {
        role: jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        for role, rows in clients.items()
    }
    assert_trees_close(expected.server.averaged, server.averaged)
    assert_trees_close(expected.clients, stacked)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [0, 5])
def test_fedavg_of_one_client_is_plain_training(padding):
    """Two epochs a round over shuffled batches, the last one short; optimizer written here."""
    setup = tiny_setup(local_epochs=2, tx=adam_l2(1e-2, 1e-3))
    data = widened(tiny_federation((("only", 10, 0, 2),), top_n=0), padding)
    simulation = simulate(build("fedavg", setup), data)
    got = run(simulation, ROUNDS)

    model, tx = setup.models["small"], plain_adam(1e-2, 1e-3)
    run_key = jax.random.key(0)
    variables = model.init(for_purpose(run_key, Purpose.SERVER_INIT), setup.sample_shape)
    images = np.asarray(data.pool.images) / 127.5 - 1.0
    labels = np.asarray(data.pool.targets)
    mine = np.asarray(data.groups[0].train.index)[0, :10]

    @jax.jit
    def gradient(params, stats, x, y):
        def loss_fn(params):
            state = {"params": params, "batch_stats": stats}
            logits, new_stats = apply_model(model, state, x, train=True)
            log_probs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            return -jnp.mean(log_probs[jnp.arange(len(y)), y]), new_stats

        return jax.grad(loss_fn, has_aux=True)(params)

    for round in range(ROUNDS):
        key = for_purpose(client_round_key(run_key, round, 0), Purpose.PRIVATE_BATCHES)
        opt_state = tx.init(variables["params"])
        for epoch in range(2):
            order = mine[np.argsort(jax.random.bits(jax.random.fold_in(key, epoch), (10,)))]
            for start in range(0, 10, BATCH):
                batch = order[start : start + BATCH]
                params, stats = variables["params"], variables["batch_stats"]
                grads, stats = gradient(params, stats, images[batch], labels[batch])
                updates, opt_state = tx.update(grads, opt_state, params)
                params = jax.tree.map(jnp.add, params, updates)
                variables = {"params": params, "batch_stats": stats}
    assert_trees_close(got.server.variables, variables)


@pytest.mark.slow
def test_metrics_are_those_of_each_clients_own_split():
    """Predictions in batches over padded tables, against one pass over the client's examples."""
    method, data = algorithm("fedhelp"), federation()
    start, _, _ = reference()
    results = simulate(method, data, eval_batch_size=2).evaluate(start, "test")
    for group in data.groups:
        client = method.clients[group.role]
        assert list(results[group.role]) == list(client.models)
        for i, size in enumerate(group.test.size.tolist()):
            index = np.asarray(group.test.index)[i, :size]
            images = np.asarray(data.pool.images)[index] / 127.5 - 1.0
            labels = np.asarray(data.pool.targets)[index]
            deployed = client.deploy(
                method.download(start.server, group.role),
                row(start.clients[group.role], i),
                ClientData(data.pool, data.public, *row(group.train, i)),
            )
            for name, variables in deployed.items():
                logits, _ = apply_model(client.models[name], variables, jnp.asarray(images))
                hits = np.argmax(np.asarray(logits), axis=-1) == labels
                got = row(results[group.role][name], i)
                assert got["accuracy"] == pytest.approx(hits.mean(), abs=FLOAT32)
                loss = cross_entropy_loss(logits, jnp.asarray(labels)).mean()
                assert got["loss"] == pytest.approx(float(loss), abs=FLOAT32)


# --- invariances ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk_size", "num_devices"),
    [(0, 1), (2, 1), pytest.param(0, 2, marks=two_devices)],
    ids=["vmap", "chunked", "sharded"],
)
def test_mapping_changes_nothing(chunk_size, num_devices):
    """The small group has 3 clients: neither chunks nor devices divide it."""
    start, expected, metrics = reference()
    simulation = simulate(
        algorithm("fedhelp"), federation(), chunk_size=chunk_size, num_devices=num_devices
    )
    got = outcome(simulation, None if num_devices == 2 else start)
    assert_trees_close(got, expected)
    if num_devices == 2:
        assert_trees_close(simulation.evaluate(got[0], "test"), metrics, FLOAT32)


def widened(data, columns):
    """The same federation in wider tables, the padding full of other clients' examples."""

    def widen(table):
        size = np.asarray(table.size)
        index = np.pad(np.asarray(table.index), [(0, 0), (0, columns)])
        noise = np.random.default_rng(3).integers(0, len(data.pool.targets), size=index.shape)
        real = np.arange(index.shape[1]) < size[:, None]
        return ClientIndex(jnp.asarray(np.where(real, index, noise), jnp.int32), table.size)

    groups = [
        g._replace(train=widen(g.train), validation=widen(g.validation), test=widen(g.test))
        for g in data.groups
    ]
    return data._replace(groups=tuple(groups))


@pytest.mark.slow
def test_rounds_in_one_dispatch_change_nothing():
    """The state and every report; the second call, of fewer rounds, is the same program."""
    start, (expected, reports), _ = reference()
    simulation = simulate(algorithm("fedhelp"), federation(), rounds_at_once=3)
    state, infos = simulation.rounds(
        jax.device_put(start, simulation.mapping.replicated), 0, ROUNDS
    )
    assert_trees_close(on_host(state), expected)
    for info, report in zip(infos, reports, strict=True):
        assert_trees_close(by_client(simulation, info), report)
    compiled = compile_totals().programs
    _, infos = simulation.rounds(state, ROUNDS, ROUNDS + 1)
    assert len(infos) == 1
    assert compile_totals().programs == compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk_size", "num_devices"), [(1, 1), (2, 1), (0, 1), pytest.param(2, 2, marks=two_devices)]
)
def test_a_mean_is_taken_while_clients_run(chunk_size, num_devices):
    """Uploads of all clients never lie beside each other; weights are by examples here."""
    options = {"client_weights": "examples", "participation_rate": 0.5}
    expected = run(simulate(algorithm("fedavg"), federation(0), **options), ROUNDS)
    mapping = {"chunk_size": chunk_size, "num_devices": num_devices}
    simulation = simulate(algorithm("fedavg"), federation(0), **mapping, **options)
    (group,) = simulation.groups
    trained = simulation.train_shapes(group, simulation.state_shapes())
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trained.upload)} == {num_devices}
    assert trained.weight.shape == (num_devices,)
    assert_trees_close(run(simulation, ROUNDS), expected)


@pytest.mark.slow
def test_a_client_need_not_keep_its_copy():
    with_copies = simulate(algorithm("fedavg"), federation())
    without = simulate(build("fedavg", tiny_setup(public=PUBLIC), personal=False), federation())
    expected, state = run(with_copies, ROUNDS), run(without, ROUNDS)
    assert_trees_equal(state.server, expected.server)
    assert not jax.tree.leaves(state.clients)
    metrics = without.evaluate(state, "test")["small"]
    assert list(metrics) == ["global"]
    assert_trees_close(metrics["global"], with_copies.evaluate(expected, "test")["small"]["global"])


@pytest.mark.slow
def test_padding_changes_nothing():
    start, expected, metrics = reference()
    simulation = simulate(algorithm("fedhelp"), widened(federation(), 7))
    got = outcome(simulation, start)
    assert_trees_close(got, expected)
    assert_trees_close(simulation.evaluate(got[0], "test"), metrics, FLOAT32)


@pytest.mark.slow
def test_the_order_of_clients_changes_nothing():
    def backwards(group):
        tables = {
            name: jax.tree.map(lambda leaf: leaf[::-1], getattr(group, name))
            for name in ("ids", "train", "validation", "test")
        }
        return group._replace(names=group.names[::-1], **tables)

    data = federation()
    data = data._replace(groups=tuple(backwards(g) for g in data.groups))
    state, reports = outcome(simulate(algorithm("fedhelp"), data))
    clients, reports = jax.tree.map(lambda leaf: leaf[::-1], (state.clients, reports))
    assert_trees_close((state._replace(clients=clients), reports), reference()[1])


@functools.cache
def fedavg_server(top_n=0, seed=0):
    return run(simulate(algorithm("fedavg"), federation(top_n), seed=seed), ROUNDS).server


@pytest.mark.slow
def test_roles_change_nothing_for_a_method_that_has_none():
    """Keys are folds of a client's position in the data set, so groups do not matter."""
    assert_trees_close(fedavg_server(top_n=2), fedavg_server(top_n=0))


def test_the_draw_of_participants_is_by_client():
    """Whoever is drawn is drawn in whatever row they stand."""
    small = federation().groups[0]
    turned = small._replace(ids=small.ids[::-1])
    simulation = simulate(algorithm("fedavg"), federation(), participation_rate=0.3)
    for round in range(5):
        drawn = [
            group.ids[
                simulation.phases.participants(
                    "small", group.ids, simulation.run_key, jnp.int32(round)
                )[0]
            ]
            for group in (small, turned)
        ]
        assert drawn[0] == drawn[1]


def test_another_seed_is_another_run():
    assert differs(fedavg_server(seed=1), fedavg_server(seed=0))


# --- empty slots, clients without examples ---


@pytest.mark.slow
@two_devices
def test_empty_slots_never_leak():
    """What fills up the last device leaves and sends NaN here, and nobody notices."""
    healthy = algorithm("fedhelp")

    def poisoned(client):
        def update(key, download, state, data):
            results = client.update(key, download, state, data)
            return jax.tree.map(lambda leaf: jnp.where(data.size == 0, jnp.nan, leaf), results)

        return client._replace(update=update)

    method = healthy._replace(clients={r: poisoned(c) for r, c in healthy.clients.items()})
    simulation = simulate(method, federation(), num_devices=2)
    small = simulation.groups[0]
    slots = simulation.train_shapes(small, simulation.state_shapes()).slot.shape
    assert slots == (4,) and len(small.names) == 3
    start, expected, _ = reference()
    assert_trees_close(outcome(simulation, start), expected)


def test_an_empty_slot_trains_on_nothing():
    """It would cost as much as a client."""
    method = algorithm("fedavg")

    def counted(client):
        def update(key, download, state, data):
            state, upload, info = client.update(key, download, state, data)
            return state, upload, info | {"examples": data.size}

        return client._replace(update=update)

    method = method._replace(clients={r: counted(c) for r, c in method.clients.items()})
    simulation = simulate(method, federation(), num_devices=2)
    _, info = simulation.round(simulation.init(), 0)
    empty = 0
    for group in simulation.groups:
        nobody = np.asarray(info.participants[group.role]) >= len(group.names)
        examples = np.asarray(info.info[group.role]["examples"])
        assert (examples[nobody] == 0).all() and (examples[~nobody] > 0).all()
        empty += nobody.sum()
    assert empty == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "role"), [("fedhelp", "small"), ("fedhelp", "large"), ("fedavg", "small")]
)
def test_a_client_without_examples_changes_nothing(name, role):
    """Under vmap, beside a client that trains."""
    method, data, run_key = algorithm(name), federation(), jax.random.key(0)
    client = method.clients[role]
    download = method.download(method.init(run_key), role)
    state = client.init(run_key, jnp.int32(1))
    index = data.groups[0].train.index[0]

    @jax.jit
    @jax.vmap
    def update(size):
        own = ClientData(data.pool, data.public, index, size)
        return client.update(run_key, download, state, own)

    states, uploads, info = update(jnp.array([0, 5]))
    sent = download.variables if name == "fedhelp" else download
    assert_trees_equal(row(states, 0), state)
    assert_trees_equal(row(uploads, 0), sent)
    assert differs(row(states, 1), state) and differs(row(uploads, 1), sent)
    assert info["loss"][0] == 0 and info["loss"][1] > 0


# --- who takes part, and with what weight ---


def test_only_those_chosen_change():
    """Half of 3 small and 2 large clients, rounded up, others in other rounds, one program."""
    compile_totals()
    simulation = simulate(algorithm("fedhelp"), federation(), participation_rate=0.5)
    state, chosen = simulation.init(), {"small": set(), "large": set()}
    for round in range(8):
        before, compiled = on_host(state.clients), compile_totals().programs
        state, info = simulation.round(state, round)
        assert round == 0 or compile_totals().programs == compiled
        after = on_host(state.clients)
        for group in simulation.groups:
            present = tuple(np.array(info.participants[group.role]).tolist())
            chosen[group.role].add(present)
            for i in range(len(group.names)):
                changed = differs(row(before[group.role], i), row(after[group.role], i))
                assert changed == (i in present)
    assert chosen == {"small": {(0, 1), (0, 2), (1, 2)}, "large": {(0,), (1,)}}


@pytest.mark.parametrize(
    ("fraction", "expected"), [(1.0, [3, 2]), (1e-9, [1, 1]), (2 / 3, [2, 2]), (0.34, [2, 1])]
)
def test_the_number_that_takes_part_is_rounded_up(fraction, expected):
    simulation = simulate(algorithm("fedavg"), federation(), participation_rate=fraction)
    assert [simulation.phases.num_participants(g.role) for g in simulation.groups] == expected


@pytest.mark.slow
def test_the_server_can_weigh_clients_by_their_examples():
    """Uniform weights stand in the loop over clients above."""
    simulation = simulate(algorithm("fedavg"), federation(), client_weights="examples")
    state, _ = simulation.round(simulation.init(), 0)
    kept = on_host(state.clients)  # a client of FedAvg keeps what it sends
    uploads = {
        name: row(kept[group.role], i)
        for group in simulation.groups
        for i, name in enumerate(group.names)
    }
    sizes = {name: train for name, train, *_ in CLIENTS}
    weights = [sizes[name] for name in uploads]
    mean = jax.tree.map(lambda *rows: np.average(rows, axis=0, weights=weights), *uploads.values())
    assert_trees_close(state.server.variables, mean)


def test_weighted_mean_leaves_out_weight_zero():
    stacks = [{"a": jnp.array([[1.0], [np.nan], [4.0]])}, {"a": jnp.array([[np.inf], [7.0]])}]
    got = weighted_mean(stacks, [jnp.array([1, 0, 2]), jnp.array([0, 3])])
    np.testing.assert_allclose(got["a"], [(1 + 8 + 21) / 6], rtol=1e-15)


@pytest.mark.parametrize(
    ("largest", "side", "expected"),
    [
        (1, 8, 1),
        (8, 8, 8),
        (64, 8, 64),
        (65, 8, 40),
        (150, 8, 56),
        (9, 8, 16),
        (9, 256, 3),
        (2, 1024, 1),
    ],
)
def test_the_largest_split_is_evaluated_in_equal_batches(largest, side, expected):
    clients = (("a", 70, 1, largest), ("b", 5, 0, 1), ("c", 5, 1, 1))
    found = _eval_batch_size((side, side), tiny_federation(clients, top_n=1, public=None))
    assert found == expected
