"""Whole rounds of methods against PyTorch in float64: the server's model and every client's state.

The PyTorch code is written from the papers, the way a PyTorch user would: terms of a loss are left
to autograd, teachers are detached. Nothing of ``fedhelp_jax`` is used there.
"""

import copy

import jax
import numpy as np
import pytest
from helpers import CLASSES, SIZE, row, tiny_federation, tiny_model
from numpy_network import RATE, batches, clients_of, rounds_of, setup

from fedhelp_jax.algorithms.client import adam_l2

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no parity to check")
nn = torch.nn
functional = torch.nn.functional
torch.set_num_threads(1)

ROUNDS = 2
ADAM_RATE, DECAY = 0.01, 0.02
TOLERANCE = 1e-9
# (name, train, validation, test): PyTorch refuses to normalise a batch of one example.
NO_BATCH_OF_ONE = (("a", 6, 1, 4), ("b", 14, 2, 5), ("c", 2, 0, 2), ("d", 10, 1, 3), ("e", 7, 0, 1))


pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("float64")]


# --- Networks. ---


class TwoLayers(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.dense = nn.Linear(inputs, width, bias=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.dense(x)))


class Normalised(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.dense = nn.Linear(inputs, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = x.reshape(len(x), SIZE, SIZE, 3).permute(0, 3, 1, 2)
        x = functional.avg_pool2d(x, 4).permute(0, 2, 3, 1).flatten(1)
        return self.head(functional.relu(self.norm(self.dense(x))))


def network(variables):
    """A network in training mode with the weights and running statistics of our variables."""
    params, stats = variables["params"], variables["batch_stats"]
    leaves = params["features"]["dense"], params["head"]["kernel"], params["head"]["bias"]
    model = (Normalised if stats else TwoLayers)(*leaves[0].shape).double()
    with torch.no_grad():
        for parameter, leaf in zip(model.parameters(), leaves, strict=True):
            parameter.copy_(torch.tensor(leaf.T))
        if stats:
            model.norm.running_mean.copy_(torch.tensor(stats["mean"]))
            model.norm.running_var.copy_(torch.tensor(stats["var"]))
    return model


def params_tree(tensors):
    """Our tree of a tensor per parameter, such as the parameters themselves."""
    dense, kernel, bias = (tensor.detach().numpy().T for tensor in tensors)
    return {"features": {"dense": dense}, "head": {"kernel": kernel, "bias": bias}}


def variables_tree(model):
    stats = {}
    if isinstance(model, Normalised):
        stats = {"mean": model.norm.running_mean.numpy(), "var": model.norm.running_var.numpy()}
    return {"params": params_tree(model.parameters()), "batch_stats": stats}


# --- Methods. ---


def loaders(data, round):
    """A client's place in the states, and its batches of a round."""
    for role, i, client_id, index in clients_of(data):
        loader = batches(data, round, client_id, index)
        yield (role, i), [(torch.tensor(x), torch.tensor(y).long()) for x, y in loader]


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=ADAM_RATE, weight_decay=DECAY)


def fit(model, loader, mu=0.0, anchor=None):
    """Local epochs of F(w) + mu/2 |w - anchor|^2."""
    optimizer = adam(model)
    for x, y in loader:
        loss = functional.cross_entropy(model(x), y)
        if anchor is not None:
            pairs = zip(model.parameters(), anchor.parameters(), strict=True)
            loss = loss + mu / 2 * sum((p - a.detach()).square().sum() for p, a in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def set_to_mean(server, models):
    states = [model.state_dict() for model in models]
    server.load_state_dict(
        {k: torch.stack([s[k] for s in states]).double().mean(dim=0) for k in server.state_dict()}
    )


def fedavg(server, model, own, loader):
    fit(model, loader)
    own.load_state_dict(model.state_dict())


def fedprox(server, model, own, loader, *, mu):
    fit(model, loader, mu, server)
    own.load_state_dict(model.state_dict())


def ditto(server, model, own, loader, *, lam):
    fit(model, loader)
    fit(own, loader, lam, server)


def fml(server, meme, own, loader, *, alpha, beta):
    kl = nn.KLDivLoss(reduction="batchmean", log_target=True)
    optimizers = adam(own), adam(meme)
    for x, y in loader:
        w, v = own(x), meme(x)
        log_w, log_v = w.log_softmax(dim=-1), v.log_softmax(dim=-1)
        # KLDivLoss(student, teacher) is KL(teacher || student).
        own_loss = alpha * functional.cross_entropy(w, y) + (1 - alpha) * kl(log_w, log_v.detach())
        meme_loss = beta * functional.cross_entropy(v, y) + (1 - beta) * kl(log_v, log_w.detach())
        for optimizer, loss in zip(optimizers, (own_loss, meme_loss), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def scaffold(server, model, loader, c_i, c):
    """A client's new control variate (option II); trains ``model``."""
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in loader:
        sgd.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        for p, mine, all in zip(model.parameters(), c_i, c, strict=True):
            p.grad += all - mine
        sgd.step()
    tensors = zip(c_i, c, server.parameters(), model.parameters(), strict=True)
    return [mine - all + (x - y).detach() / (len(loader) * RATE) for mine, all, x, y in tensors]


# --- Parity. ---


def assert_close(got, expected):
    """The norm of every leaf's difference, relative to the leaf's norm."""

    def check(path, ours, theirs):
        name = jax.tree_util.keystr(path)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert difference <= TOLERANCE, f"{name}: {difference}"

    assert jax.tree.leaves(expected), "nothing is compared"
    jax.tree.map_with_path(check, got, expected)


SETTINGS = {
    fedavg: {},
    fedprox: {"mu": 0.3},
    ditto: {"lam": 0.7},
    fml: {"alpha": 0.3, "beta": 0.6},
}


@pytest.mark.parametrize(
    ("method", "network_name"),
    [*((method, "tanh") for method in SETTINGS), (fedavg, "batch norm"), (fml, "batch norm")],
)
def test_methods_that_average(method, network_name):
    settings = SETTINGS[method]
    data, given = tiny_federation(), setup(tx=adam_l2(ADAM_RATE, DECAY))
    if network_name == "batch norm":
        data = tiny_federation(NO_BATCH_OF_ONE)
        models = {"small": tiny_model(CLASSES, 4), "large": tiny_model(CLASSES, 7)}
        given = given._replace(models=models)
    _, states = rounds_of(method.__name__, ROUNDS, data, given, **settings)
    server = network(states[0].server.variables)
    own = {(role, i): network(row(states[0].clients[role], i)) for role, i, *_ in clients_of(data)}
    for round, state in enumerate(states[1:]):
        uploads = []
        for (role, i), loader in loaders(data, round):
            uploads.append(copy.deepcopy(server))
            method(server, uploads[-1], own[role, i], loader, **settings)
            assert_close(row(state.clients[role], i), variables_tree(own[role, i]))
        set_to_mean(server, uploads)
        assert_close(state.server.variables, variables_tree(server))


def test_scaffold():
    data = tiny_federation()
    _, states = rounds_of("scaffold", ROUNDS, data)
    server = network(states[0].server.averaged.variables)
    zeros = [torch.zeros_like(p) for p in server.parameters()]
    c, controls = zeros, {(role, i): zeros for role, i, *_ in clients_of(data)}
    for round, state in enumerate(states[1:]):
        uploads, changes = [], []
        for (role, i), loader in loaders(data, round):
            uploads.append(copy.deepcopy(server))
            old = controls[role, i]
            new = controls[role, i] = scaffold(server, uploads[-1], loader, old, c)
            changes.append([b - a for a, b in zip(old, new, strict=True)])
            ours = row(state.clients[role], i)
            assert_close(ours.variables, variables_tree(uploads[-1]))
            assert_close(ours.control, params_tree(new))
        set_to_mean(server, uploads)
        c = [a + sum(d) / len(changes) for a, *d in zip(c, *changes, strict=True)]
        assert_close(state.server.averaged.variables, variables_tree(server))
        assert_close(state.server.control, params_tree(c))
