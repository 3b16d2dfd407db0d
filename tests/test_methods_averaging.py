"""Methods that average one architecture, against NumPy in float64 written from their papers."""

import jax
import pytest
from helpers import assert_trees_close, row, tiny_federation
from numpy_network import batches, clients_of, combine, gradient, mean, rounds_of, step

ROUNDS = 2
pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("name", "mu"), [("fedavg", 0.0), ("fedprox", 0.3)])
def test_fedavg_and_fedprox(name, mu):
    """w_i <- w_i - rate (grad F_i(w_i) + mu (w_i - w)); w <- mean w_i."""
    data = tiny_federation()
    settings = {} if name == "fedavg" else {"mu": mu}
    _, states = rounds_of(name, ROUNDS, data, **settings)
    w = states[0].server.variables["params"]
    for round in range(ROUNDS):
        uploads = []
        for role, i, client_id, index in clients_of(data):
            mine = w
            for x, y in batches(data, round, client_id, index):
                g = gradient(mine, x, y)
                mine = step(mine, combine(lambda g, p, a: g + mu * (p - a), g, mine, w))
            assert_trees_close(row(states[round + 1].clients[role], i)["params"], mine)
            uploads.append(mine)
        w = mean(uploads)
        assert_trees_close(states[round + 1].server.variables["params"], w)
