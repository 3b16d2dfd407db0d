"""FedKD and FedType against NumPy in float64 written from their docstrings, and switched off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import CLASSES, assert_trees_close, row, tiny_federation
from numpy_network import (
    backward,
    batches,
    clients_of,
    combine,
    d_cross_entropy,
    d_divergence,
    examples,
    forward,
    mean,
    rounds_of,
    setup,
    softmax,
    step,
)

from fedhelp_jax.algorithms.fedkd import low_rank
from fedhelp_jax.losses import ranking_distillation_loss, set_ranking_loss

ROUNDS = 2
pytestmark = pytest.mark.usefixtures("float64")


def cross_entropy(logits, y):
    return -np.mean(np.log(softmax(logits)[np.arange(len(y)), y]))


# --- FedKD ---


def cut(update, energy, ranks):
    """Every matrix of a tree by its fewest singular vectors with that share of its energy."""

    def one(leaf):
        if leaf.ndim < 2:
            return leaf
        u, sigma, v = np.linalg.svd(leaf, full_matrices=False)
        held = np.cumsum(sigma**2) / max(np.sum(sigma**2), 1e-300)
        rank = 0 if sigma[0] == 0 else 1 + int(np.argmax(held >= energy))
        ranks.append((rank, len(sigma)))
        return (u[:, :rank] * sigma[:rank]) @ v[:rank]

    return combine(one, update)


def learned(w, v, projection, x, y):
    """Mentor, mentee and projection after one step on a batch."""
    (w_h, w_logits), (v_h, v_logits) = forward(w, x), forward(v, x)
    unsure = cross_entropy(w_logits, y) + cross_entropy(v_logits, y)
    apart = 2 * (w_h - v_h @ projection) / w_h.size / unsure
    d_w = d_cross_entropy(w_logits, y) + d_divergence(w_logits, v_logits) / unsure
    d_v = d_cross_entropy(v_logits, y) + d_divergence(v_logits, w_logits) / unsure
    return (
        step(w, backward(w, x, d_w, apart)),
        step(v, backward(v, x, d_v, -apart @ projection.T)),
        step(projection, -v_h.T @ apart),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("start", "end"), [(0.6, 0.9), (1.0, 1.0)])
def test_fedkd(start, end):
    data = tiny_federation()
    given = setup(rounds=ROUNDS)
    _, states = rounds_of("fedkd", ROUNDS, data, given, energy_start=start, energy_end=end)
    mentee = states[0].server.averaged.variables["params"]
    own = {
        (role, i): (found.variables["params"], found.projection)
        for role, i, *_ in clients_of(data)
        for found in [row(states[0].clients[role], i)]
    }
    ranks = []
    for round in range(ROUNDS):
        energy = start + (end - start) * (round + 1) / ROUNDS
        sent, trained = [], []
        for role, i, client_id, index in clients_of(data):
            (w, projection), v = own[role, i], mentee
            for x, y in batches(data, round, client_id, index):
                w, v, projection = learned(w, v, projection, x, y)
            own[role, i] = w, projection
            found = row(states[round + 1].clients[role], i)
            assert_trees_close(found.variables["params"], w)
            assert_trees_close(found.projection, projection)
            sent.append(cut(combine(np.subtract, v, mentee), energy, ranks))
            trained.append(v)
        mentee = combine(np.add, mentee, cut(mean(sent), energy, ranks))
        assert_trees_close(states[round + 1].server.averaged.variables["params"], mentee)
        if energy == 1:  # all is sent
            assert_trees_close(mentee, mean(trained))
    assert end == 1 or any(0 < rank < whole for rank, whole in ranks)


def file_bytes(arrays):
    """Bytes of arrays in a file, without its header, whose length stands in front."""
    content = safetensors.numpy.save({str(i): array for i, array in enumerate(arrays)})
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_bytes_of_factors_are_those_of_a_file_with_them(rank):
    rng = np.random.default_rng(rank)
    kernel = (rng.normal(size=(2, 5, rank)) @ rng.normal(size=(rank, 6))).astype(np.float32)
    found, size = low_rank(jnp.asarray(kernel), jnp.float32(1 - 1e-6))
    u, sigma, v = np.linalg.svd(kernel.reshape(10, 6), full_matrices=False)
    factors = [np.ascontiguousarray(a) for a in (u[:, :rank], sigma[:rank], v[:rank])]
    # Past half of the rank the matrix itself is smaller.
    assert int(size) == min(file_bytes(factors), file_bytes([kernel]))
    np.testing.assert_allclose(found, kernel, atol=1e-4)


def test_what_has_one_axis_travels_in_full():
    bias = jnp.arange(7.0, dtype=jnp.float32)
    found, size = low_rank(bias, jnp.float32(0.1))
    assert size == file_bytes([np.asarray(bias)])
    np.testing.assert_array_equal(found, bias)


# --- FedType ---

BINS = 2048


def score_bins(logits, penalty, k_reg):
    """Bins ``[n, C]`` of the RAPS scores."""
    bins = np.empty(logits.shape, int)
    largest = 1 + penalty * max(0, CLASSES - k_reg)
    for i, p in enumerate(softmax(logits)):
        total = 0.0
        for size, c in enumerate(np.argsort(-p, kind="stable"), start=1):
            total += p[c]
            score = total + penalty * max(0, size - k_reg)
            bins[i, c] = min(int(score * BINS / largest), BINS - 1)
    return bins


def calibrated(params, x, y, miscoverage, penalty, k_reg):
    bins = np.sort(score_bins(forward(params, x)[1], penalty, k_reg)[np.arange(len(y)), y])
    place = int(np.ceil((len(y) + 1) * (1 - miscoverage)))
    return BINS if place > len(y) else bins[place - 1]


def sets_of(params, x, tau, penalty, k_reg):
    logits = forward(params, x)[1]
    found = score_bins(logits, penalty, k_reg) <= tau
    found[np.arange(len(x)), logits.argmax(-1)] = True
    return found


def ranked(logits, sets):
    """Derivative by the logits of the batch mean of R, and whether there is any."""
    gradient = np.zeros_like(logits)
    for i, (s, top) in enumerate(zip(logits, sets, strict=True)):
        pairs = [(t, r) for t in np.flatnonzero(top) for r in np.flatnonzero(~top)]
        for t, r in pairs:
            if s[r] > s[t]:
                gradient[i, t] -= 1 / len(pairs) / len(logits)
                gradient[i, r] += 1 / len(pairs) / len(logits)
    return gradient


def agreement(proxy, private):
    values = []
    for a, b in zip(proxy, private, strict=True):
        whole = (a | b).sum() if b.sum() <= a.sum() else a.sum()
        values.append((a & b).sum() / whole)
    return np.mean(values)


@pytest.mark.slow
def test_fedtype():
    miss, k_reg, by_proxy, by_own = 0.4, 1, 0.05, 0.1
    data = tiny_federation()
    _, states = rounds_of(
        "fedtype",
        ROUNDS,
        data,
        miscoverage=miss,
        k_reg=k_reg,
        penalty_proxy=by_proxy,
        penalty_private=by_own,
    )
    proxy = states[0].server.variables["params"]
    own = {(role, i): row(states[0].clients[role], i)["params"] for role, i, *_ in clients_of(data)}
    sizes, pushed = set(), False
    for round in range(ROUNDS):
        uploads = []
        for role, i, client_id, index in clients_of(data):
            w, v = own[role, i], proxy
            everything = examples(data, index)
            w_tau = calibrated(w, *everything, miss, by_own, k_reg)
            v_tau = calibrated(v, *everything, miss, by_proxy, k_reg)
            for x, y in batches(data, round, client_id, index):
                v_sets = sets_of(v, x, v_tau, by_proxy, k_reg)
                agreed = agreement(v_sets, sets_of(w, x, w_tau, by_own, k_reg))
                logits = forward(w, x)[1]
                ranking = ranked(logits, v_sets)
                pushed |= bool(ranking.any())
                sizes |= set(v_sets.sum(axis=-1))
                w = step(w, backward(w, x, d_cross_entropy(logits, y) + agreed * ranking))
                said = forward(v, x)[1]
                taught = d_cross_entropy(said, y) + d_divergence(said, forward(w, x)[1])
                v = step(v, backward(v, x, taught))
            own[role, i] = w
            assert_trees_close(row(states[round + 1].clients[role], i)["params"], w)
            uploads.append(v)
        proxy = mean(uploads)
        assert_trees_close(states[round + 1].server.variables["params"], proxy)
    assert pushed and len(sizes) > 1


@pytest.mark.slow
def test_fedtype_whose_sets_are_all_classes_leaves_networks_alone():
    _, ours = rounds_of("fedtype", ROUNDS, miscoverage=0.0)
    _, local = rounds_of("local", ROUNDS)
    for mine, alone in zip(ours, local, strict=True):
        assert_trees_close(mine.clients, alone.clients)


@pytest.mark.slow
def test_a_ranking_of_given_sets():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 5, CLASSES))
    sets = rng.random((5, CLASSES)) < 0.5
    sets[0], sets[1] = False, True
    found = set_ranking_loss(jnp.asarray(logits), jnp.asarray(sets), margin=0.3)
    for s, top, value in zip(logits, sets, found, strict=True):
        hinges = [max(0, 0.3 + r - t) for t in s[top] for r in s[~top]]
        np.testing.assert_allclose(value, np.mean(hinges) if hinges else 0, rtol=1e-12)
    slope = jax.grad(lambda x: jnp.sum(set_ranking_loss(x, jnp.asarray(sets))))(jnp.asarray(logits))
    assert np.isfinite(slope).all() and not slope[:2].any() and slope[2:].any()
    largest = np.zeros_like(sets)
    largest[np.arange(5)[:, None], np.argsort(-teacher)[:, :2]] = True
    np.testing.assert_array_equal(
        set_ranking_loss(jnp.asarray(logits), jnp.asarray(largest)),
        ranking_distillation_loss(jnp.asarray(logits), jnp.asarray(teacher), k=2),
    )
