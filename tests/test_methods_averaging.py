"""Methods that average one architecture, against NumPy in float64 written from their papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    CLASSES,
    assert_trees_close,
    assert_trees_equal,
    build,
    on_host,
    row,
    simulate,
    tiny_federation,
)
from numpy_network import (
    INPUTS,
    RATE,
    backward,
    batches,
    clients_of,
    combine,
    d_cross_entropy,
    examples,
    forward,
    gradient,
    mean,
    rounds_of,
    server_batches,
    setup,
    step,
)

from fedhelp_jax.algorithms.fedbn import is_normalisation
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.models.layers import linear
from fedhelp_jax.models.model import Model
from fedhelp_jax.models.resnet import resnet
from fedhelp_jax.models.unet import UNETS, unet

ROUNDS = 2
pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def states_of(name, **settings):
    """A method's states before and after each round of a group of large clients, once computed."""
    return rounds_of(name, ROUNDS, tiny_federation(top_n=5), **settings)[1]


def trained(params, data, *anchors, rule=lambda g, p: g, gradient=gradient):
    """``params`` after a step along ``rule(gradient, params, *anchors)`` on each batch."""
    for x, y in data:
        params = step(params, combine(rule, gradient(params, x, y), params, *anchors))
    return params


def pull(weight):
    """The gradient of a loss with ``weight/2 |params - anchor|^2`` added."""
    return lambda g, p, anchor: g + weight * (p - anchor)


def compare(name, update, given=None, server=lambda gs: gs[-1], rounds=ROUNDS, **settings):
    """A method whose server averages: w <- w - server(g), g = w - mean of uploads, so far.

    ``update(w, own, client's batches)`` gives a client's new state and its upload. Returns the
    simulation and its last state.
    """
    data, given = tiny_federation(), given or setup()
    simulation, states = rounds_of(name, rounds, data, given, **settings)
    own = {
        client_id: row(states[0].clients[role], i)["params"]
        for role, i, client_id, _ in clients_of(data)
    }
    w, gradients = states[0].server.variables["params"], []
    for round, state in enumerate(states[1:]):
        uploads = []
        for role, i, client_id, index in clients_of(data):
            local = batches(data, round, client_id, index, size=given.batch_size)
            own[client_id], upload = update(w, own[client_id], local)
            assert_trees_close(row(state.clients[role], i)["params"], own[client_id])
            uploads.append(upload)
        gradients.append(combine(lambda m, p: p - m, mean(uploads), w))
        w = combine(lambda g, p, *gs: p - server(gs), gradients[-1], w, *gradients)
        assert_trees_close(state.server.variables["params"], w)
    return simulation, states[-1]


def fedavg(w, own, data):
    """w_i <- w_i - rate grad F_i(w_i), from w."""
    w = trained(w, data)
    return w, w


@pytest.mark.parametrize(("name", "mu"), [("fedavg", 0.0), ("fedprox", 0.3)])
def test_fedavg_and_fedprox(name, mu):
    """w_i <- w_i - rate (grad F_i(w_i) + mu (w_i - w)); w <- mean w_i."""

    def update(w, own, data):
        own = trained(w, data, w, rule=pull(mu))
        return own, own

    compare(name, update, **({} if name == "fedavg" else {"mu": mu}))


def test_fedavg_with_local_priors():
    """w_i descends on CE(z + log pi_i) from w; client i deploys it, and w, with log pi_i added."""

    def update(w, own, data):
        data = list(data)
        labels = np.concatenate([y for _, y in data])  # of both epochs
        prior = prior_of(labels[: len(labels) // 2])

        def adjusted(params, x, y):
            return backward(params, x, d_cross_entropy(forward(params, x)[1] + prior, y))

        upload = trained(w, data, gradient=adjusted)
        return with_bias(upload, prior), upload

    federation = tiny_federation()
    simulation, state = compare("fedavg", update, local_priors=True)
    data, w = simulation.federation, on_host(state.server.variables)
    for role, i, _, index in clients_of(federation):
        own = ClientData(data.pool, data.public, *row(data.groups[role]["train"], i))
        deploy = simulation.phases.algorithm.clients[role].deploy
        deployed = deploy(w, row(state.clients[role], i), own)["global"]
        expected = with_bias(w["params"], prior_of(examples(federation, index)[1]))
        assert_trees_close(deployed["params"], expected)


def prior_of(labels):
    """The log of (n_c + 1) / (n + C)."""
    counts = np.bincount(labels, minlength=CLASSES)
    return np.log((counts + 1) / (len(labels) + CLASSES))


def with_bias(params, change):
    return {**params, "head": {**params["head"], "bias": params["head"]["bias"] + change}}


def momentum(gs):
    """A step of 0.7 m, m <- g + 0.9 m."""
    m = 0.0
    for g in gs:
        m = g + 0.9 * m
    return 0.7 * m


def adam(gs, start=0.0, second=lambda v, g: 0.99 * v + 0.01 * g**2):
    """A step of 0.01 m / (sqrt(v) + 1e-3), both free of bias; m <- 0.9 m + 0.1 g."""
    m = v = start
    for g in gs:
        m, v = 0.9 * m + 0.1 * g, second(v, g)
    return 0.01 * m / (1 - 0.9 ** len(gs)) / (np.sqrt(v / (1 - 0.99 ** len(gs))) + 1e-3)


def yogi(gs):
    """Adam but v <- v - 0.01 sign(v - g^2) g^2; both moments start at 1e-6."""
    return adam(gs, 1e-6, lambda v, g: v - 0.01 * np.sign(v - g**2) * g**2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tx", "server"),
    [
        (optax.sgd(0.7, momentum=0.9), momentum),
        (optax.adam(0.01, b1=0.9, b2=0.99, eps=1e-3), adam),
        (optax.yogi(0.01, b1=0.9, b2=0.99, eps=1e-3), yogi),
    ],
    ids=["momentum", "adam", "yogi"],
)
def test_the_server_optimizer_takes_the_averaged_update_as_a_gradient(tx, server):
    """Of g = w - mean w_i; w <- w - step(g), the optimizer going on from round to round."""
    compare("fedavg", fedavg, setup(server_tx=tx), server, rounds=3)


@pytest.mark.slow
def test_a_server_of_plain_sgd_of_rate_one_takes_the_mean():
    """As w - 1 (w - mean w_i) = mean w_i."""
    given = setup(server_tx=optax.sgd(1.0))
    _, states = rounds_of("fedavg", ROUNDS, tiny_federation(top_n=5), given)
    for got, expected in zip(states, states_of("fedavg"), strict=True):
        assert_trees_close(got.server.variables, expected.server.variables)
        assert_trees_close(got.clients, expected.clients)


def test_ditto():
    """v_i <- v_i - rate (grad F_i(v_i) + lambda (v_i - w)), w as it was sent; w as in FedAvg."""

    def update(w, own, data):
        data = list(data)
        return trained(own, data, w, rule=pull(0.4)), trained(w, data)

    compare("ditto", update, lam=0.4)


def test_pfedme():
    """K times theta <- theta - rate (grad F_i(theta) + lambda (theta - w_i)) on each batch.

    Then w_i <- w_i - rate lambda (w_i - theta); theta starts a round from w, which becomes
    (1 - beta) w + beta mean w_i.
    """
    lam, beta = 2.0, 0.6

    def update(w, own, data):
        own = w
        for batch in data:
            own = trained(own, [batch] * 3, w, rule=pull(lam))
            w = step(w, combine(lambda w, theta: lam * (w - theta), w, own))
        return own, w

    given = setup(server_tx=optax.sgd(beta))
    compare("pfedme", update, given, lambda gs: beta * gs[-1], lam=lam, prox_steps=3)


def test_per_fedavg():
    """Per batch u <- w - rate grad F(w; D), w <- w - rate grad F(u; D'), D and D' its halves.

    Batches have 1 to 5 examples, D the odd one. Deployed: w - rate grad F_i(w) on all that a
    client trains on.
    """

    def update(w, own, data):
        for x, y in data:
            half = (len(x) + 1) // 2
            u = step(w, gradient(w, x[:half], y[:half]))
            if half < len(x):
                w = step(w, gradient(u, x[half:], y[half:]))
        return w, w

    simulation, state = compare("per_fedavg", update, setup(batch_size=5))
    data, w = simulation.federation, state.server.variables
    federation = tiny_federation()
    for role, i, _, index in clients_of(federation):
        own = ClientData(data.pool, data.public, *row(data.groups[role]["train"], i))
        deploy = jax.jit(simulation.phases.algorithm.clients[role].deploy)
        deployed = deploy(w, row(state.clients[role], i), own)
        expected = step(w["params"], gradient(w["params"], *examples(federation, index)))
        assert_trees_close(deployed["personal"]["params"], expected)
        assert_trees_equal(on_host(deployed["global"]), w)


@pytest.mark.parametrize(("head", "everything"), [(2, 3), (0, 3), (2, 0)])
def test_lp_ft_trains_the_head_and_then_everything(head, everything):
    """Steps of w_i <- w_i - rate grad F_i(w_i), of the head's part alone at first, from w."""

    def update(w, own, data):
        data = list(data)
        own, (x, y) = w, data[0]  # with all examples in a batch, an epoch is one step
        for number in range(head + everything):
            slope = gradient(own, x, y)
            if number < head:
                slope = {**slope, "features": jax.tree.map(np.zeros_like, slope["features"])}
            own = step(own, slope)
        return own, trained(w, data)

    given = setup(batch_size=50)
    compare("lp_ft", update, given, head_epochs=head, all_epochs=everything)


@pytest.mark.slow
def test_lp_ft_averages_as_fedavg_does():
    for got, expected in zip(states_of("lp_ft"), states_of("fedavg"), strict=True):
        assert_trees_equal(on_host(got.server), on_host(expected.server))


def controlled(x, c, c_i, data, decay):
    """Gives y and c_i': y <- y - rate (grad F_i(y) + decay y - c_i + c), K times from x.

    c_i' = c_i - c + (x - y) / (K rate).
    """
    y = trained(x, data, c_i, c, rule=lambda g, p, c_i, c: g + decay * p - c_i + c)
    scale = 1 / (len(data) * RATE)
    return y, combine(lambda c_i, c, x, y: c_i - c + scale * (x - y), c_i, c, x, y)


@pytest.mark.parametrize(
    ("participation", "devices", "decay"), [(1.0, 1, 0.1), (0.5, 2, 0.0)], ids=["all", "half"]
)
def test_scaffold(participation, devices, decay):
    """Averages y, moves c by the sum of all c_i' - c_i over the number of all clients.

    Whoever takes no part keeps c_i. Clients count alike whatever their weights.
    """
    data = tiny_federation()
    simulation = simulate(
        build("scaffold", setup(weight_decay=decay)),
        data,
        participation_rate=participation,
        num_devices=devices,
        client_weights="examples",
    )
    state = simulation.init()
    server, clients = on_host(state)
    x, c = server.averaged.variables["params"], server.control
    own, kept = {}, []
    for role, i, client_id, _ in clients_of(data):
        client = row(clients[role], i)
        own[client_id] = client.variables["params"], client.control
    for round in range(4):  # in the last someone rests who has a c_i to keep
        state, info = simulation.round(state, round)
        server, clients = on_host(state)
        uploads, changes = [], []
        for role, i, client_id, index in clients_of(data):
            c_i = own[client_id][1]
            if i in np.asarray(info.participants[role]):
                local = list(batches(data, round, client_id, index))
                own[client_id] = controlled(x, c, c_i, local, decay)
                uploads.append(own[client_id][0])
                changes.append(combine(np.subtract, own[client_id][1], c_i))
            else:
                kept.append(c_i["head"]["bias"].any())
            client = row(clients[role], i)
            assert_trees_close((client.variables["params"], client.control), own[client_id])
        x = mean(uploads)
        c = combine(lambda c, *changes: c + sum(changes) / 5, c, *changes)
        assert_trees_close(server.averaged.variables["params"], x)
        assert_trees_close(server.control, c)
    assert any(kept) == (participation < 1), "nobody had a c_i to keep"


@pytest.mark.slow
def test_centralized():
    """Both architectures: w <- w - rate grad F(w) on all clients' training data."""
    data = tiny_federation()
    simulation, states = rounds_of("centralized", ROUNDS, data)
    pooled = np.sort(np.concatenate([index for *_, index in clients_of(data)]))
    assert_trees_equal(states[0].server["small"], states_of("fedavg")[0].server.variables)
    for role in ("small", "large"):
        w = states[0].server[role]["params"]
        for round in range(ROUNDS):
            w = trained(w, server_batches(data, round, pooled))
            server = states[round + 1].server
            assert_trees_close(server[role]["params"], w)
            download = simulation.phases.algorithm.download(server, role)
            deployed = simulation.phases.algorithm.clients[role].deploy(download, None, None)
            assert_trees_equal(deployed["global"], server[role])


WIDTH = 4


def normalised_layers():
    """``tanh(norm(x W1)) W2 + b``, every example normalised over its features."""

    def init(key, sample_shape):
        first, second = jax.random.split(key)
        norm = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
        dense = 0.1 * jax.random.normal(first, (INPUTS, WIDTH))
        kernel = jax.random.normal(second, (WIDTH, CLASSES))
        head = {"kernel": kernel, "bias": jnp.zeros(CLASSES)}
        return {
            "params": {"features": {"dense": dense, "norm1": norm}, "head": head},
            "batch_stats": {},
        }

    def features(variables, x, *, train, mask=None):
        params = variables["params"]["features"]
        h = x.reshape(len(x), -1) @ params["dense"]
        z = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 1e-5)
        return jnp.tanh(params["norm1"]["scale"] * z + params["norm1"]["bias"]), {}

    return Model(init, features, linear)


def normalised_gradient(params, x, y):
    """Of the mean cross-entropy of that network, by hand."""
    dense, norm, head = params["features"]["dense"], params["features"]["norm1"], params["head"]
    h = x @ dense
    deviation = np.sqrt(h.var(1, keepdims=True) + 1e-5)
    z = (h - h.mean(1, keepdims=True)) / deviation
    features = np.tanh(norm["scale"] * z + norm["bias"])
    d_logits = d_cross_entropy(features @ head["kernel"] + head["bias"], y)
    d_tanh = (d_logits @ head["kernel"].T) * (1 - features**2)
    d_z = d_tanh * norm["scale"]
    d_h = d_z - d_z.mean(1, keepdims=True) - z * (d_z * z).mean(1, keepdims=True)
    d_norm = {"scale": (d_tanh * z).sum(axis=0), "bias": d_tanh.sum(axis=0)}
    return {
        "features": {"dense": x.T @ (d_h / deviation), "norm1": d_norm},
        "head": {"kernel": features.T @ d_logits, "bias": d_logits.sum(axis=0)},
    }


def with_norm(w, own):
    """The broadcast layers with a client's own normalisation."""
    layers = {"dense": w["features"]["dense"], "norm1": own["features"]["norm1"]}
    return {"features": layers, "head": w["head"]}


def test_fedbn():
    """FedAvg of all but the normalisation's parameters, which go on from round to round.

    The server's optimizer sees no more than the rest.
    """

    def update(w, own, data):
        mine = trained(with_norm(w, own), data, gradient=normalised_gradient)
        upload = {"features": {"dense": mine["features"]["dense"]}, "head": mine["head"]}
        return {"features": {"norm1": mine["features"]["norm1"]}}, upload

    models = dict.fromkeys(("small", "large"), normalised_layers())
    given = setup(models=models, server_tx=optax.sgd(0.7, momentum=0.9))
    simulation, state = compare("fedbn", update, given, momentum)
    for role, client in simulation.phases.algorithm.clients.items():
        own, w = row(state.clients[role], 1), state.server.variables
        assert np.abs(own["params"]["features"]["norm1"]["bias"]).max() > 1e-3
        deployed = client.deploy(w, own, None)["personal"]["params"]
        assert_trees_equal(deployed, with_norm(w["params"], own["params"]))


def sizes(shapes, wanted):
    """How many numbers are in the leaves whose path is wanted."""
    leaves = jax.tree.leaves_with_path(shapes)
    return sum(leaf.size for path, leaf in leaves if wanted(tuple(entry.key for entry in path)))


@pytest.mark.parametrize(
    ("model", "shape", "channels"),
    [
        # The first convolution and two of each block; three stages of three blocks.
        (resnet(20, 3), (32, 32, 3), 7 * 16 + 6 * 32 + 6 * 64),
        # Two of each level, on the way down and on the way up.
        (
            unet(UNETS["unet_small_cpu"], 1, norm="group", remat=False),
            (16, 16, 1),
            4 * (8 + 16 + 32) + 2 * 64,
        ),
    ],
    ids=["resnet", "unet"],
)
def test_normalisation_is_known_by_its_path(model, shape, channels):
    """A scale and a bias per channel after every convolution, and all statistics; no more."""
    shapes = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    norm = [
        path[:-1]
        for path, _ in jax.tree.leaves_with_path(shapes["params"])
        if path[-1].key == "scale"
    ]
    for path, _ in jax.tree.leaves_with_path(shapes["params"]):
        names = tuple(entry.key for entry in path)
        assert is_normalisation(("params", *names)) == (path[:-1] in norm), names
    assert sizes({"params": shapes["params"]}, is_normalisation) == 2 * channels
    everything = sizes(shapes["batch_stats"], lambda path: True)
    assert sizes({"batch_stats": shapes["batch_stats"]}, is_normalisation) == everything


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("BatchNorm_0/scale", True),
        ("layer1/bn2/bias", True),
        ("GroupNorm_3/scale", True),
        ("Dense_0/bias", False),
        ("Conv_0/kernel", False),
    ],
)
def test_normalisation_of_other_networks(path, expected):
    """Flax's own names, and PyTorch's."""
    assert is_normalisation(("params", "features", *path.split("/"))) == expected


@pytest.mark.slow
def test_fedbn_without_normalisation_is_fedavg():
    """Then everything is shared."""
    for got, expected in zip(states_of("fedbn"), states_of("fedavg"), strict=True):
        assert_trees_equal(got.server.variables, expected.server.variables)


@pytest.mark.slow
def test_fedprox_without_its_term_is_fedavg():
    """With mu = 0, bit for bit."""
    for got, expected in zip(states_of("fedprox", mu=0.0), states_of("fedavg"), strict=True):
        assert_trees_equal(got, expected)


@pytest.mark.slow
def test_ditto_without_its_term_trains_alone_beside_fedavg():
    """With lambda = 0 v_i is as in local training, w as in FedAvg."""
    alone, averaged = states_of("local", small_only=True), states_of("fedavg")
    for got, local, shared in zip(states_of("ditto", lam=0.0), alone, averaged, strict=True):
        assert_trees_close(got.clients, local.clients)
        assert_trees_close(got.server.variables, shared.server.variables)


@pytest.mark.slow
def test_pfedme_without_its_term_shares_nothing():
    """With lambda = 0 w stays where it began, while theta moves."""
    first, *later = states_of("pfedme", lam=0.0)
    for state in later:
        assert_trees_close(state.server.variables, first.server.variables)
        for role, clients in state.clients.items():
            moved = (
                clients["params"]["head"]["bias"] - first.clients[role]["params"]["head"]["bias"]
            )
            assert np.abs(moved).max(axis=1).min() > 1e-3


@pytest.mark.slow
def test_scaffold_starts_as_fedavg():
    """In the first round all c are zero; later ones are not FedAvg's."""
    pairs = [
        (ours.server.averaged.variables["params"], theirs.server.variables["params"])
        for ours, theirs in zip(states_of("scaffold"), states_of("fedavg"), strict=True)
    ]
    assert_trees_close(*pairs[0])
    assert_trees_close(*pairs[1])
    assert np.abs(pairs[2][0]["head"]["bias"] - pairs[2][1]["head"]["bias"]).max() > 1e-3
