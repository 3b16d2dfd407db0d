"""FML against NumPy in float64 written from its paper, and switched off."""

import pytest
from helpers import assert_trees_close, row, tiny_federation
from numpy_network import (
    backward,
    batches,
    clients_of,
    d_cross_entropy,
    d_divergence,
    forward,
    mean,
    rounds_of,
    step,
)

ROUNDS = 2
pytestmark = pytest.mark.usefixtures("float64")


def mutual_gradient(params, x, y, teacher, share):
    """Of share CE + (1 - share) KL(teacher || student), the teacher's logits being given."""
    _, logits = forward(params, x)
    labels, other = d_cross_entropy(logits, y), d_divergence(logits, teacher)
    return backward(params, x, share * labels + (1 - share) * other)


@pytest.mark.slow
def test_fml():
    """Both networks step at once, each on labels and on what the other said before the step."""
    alpha, beta = 0.3, 0.6
    data = tiny_federation()
    _, states = rounds_of("fml", ROUNDS, data, alpha=alpha, beta=beta)
    meme = states[0].server.variables["params"]
    own = {(role, i): row(states[0].clients[role], i)["params"] for role, i, *_ in clients_of(data)}
    widths = {role: params["head"]["kernel"].shape[0] for (role, _), params in own.items()}
    assert widths == {"small": 4, "large": 7}
    for round in range(ROUNDS):
        uploads = []
        for role, i, client_id, index in clients_of(data):
            w, v = own[role, i], meme
            for x, y in batches(data, round, client_id, index):
                said = {"w": forward(w, x)[1], "v": forward(v, x)[1]}
                w = step(w, mutual_gradient(w, x, y, said["v"], alpha))
                v = step(v, mutual_gradient(v, x, y, said["w"], beta))
            own[role, i] = w
            assert_trees_close(row(states[round + 1].clients[role], i)["params"], w)
            uploads.append(v)
        meme = mean(uploads)
        assert_trees_close(states[round + 1].server.variables["params"], meme)


@pytest.mark.slow
def test_fml_on_labels_alone_is_local_training_and_fedavg():
    _, fml = rounds_of("fml", ROUNDS, alpha=1.0, beta=1.0)
    _, local = rounds_of("local", ROUNDS)
    _, fedavg = rounds_of("fedavg", ROUNDS)
    for ours, alone, averaged in zip(fml, local, fedavg, strict=True):
        assert_trees_close(ours.clients, alone.clients)
        assert_trees_close(ours.server, averaged.server)
