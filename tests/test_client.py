"""The order in which a client sees its examples and the public ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhelp_jax.algorithms.client import public_batches, run_epochs, shuffled
from fedhelp_jax.data.federation import ClientData, Pool, PublicPool


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0, 1, 6, 11])
def test_shuffling_does_not_change_with_the_padding(seed, size):
    """And is a permutation of the real examples, then the padding in its place."""
    key = jax.random.key(seed)
    orders = [np.asarray(shuffled(key, size, length)) for length in (max(size, 1), 11, 12, 40)]
    for order in orders:
        assert order[:size].tolist() == orders[0][:size].tolist()
        assert sorted(order[:size].tolist()) == list(range(size))
        assert order[size:].tolist() == list(range(size, len(order)))


def test_shuffling_is_fair_and_depends_on_the_key():
    keys = jax.vmap(jax.random.key)(jnp.arange(3000))
    first = np.asarray(jax.vmap(lambda key: shuffled(key, 5, 8))(keys))[:, 0]
    counts = np.bincount(first, minlength=5)
    assert counts.sum() == 3000 and counts.shape == (5,)
    assert np.abs(counts - 600).max() < 6 * 600**0.5


@pytest.mark.parametrize("size", [0, 1, 4, 10])
def test_epochs_go_over_every_example_once(size):
    """3 epochs in batches of 4: steps count on, orders differ, reports are means over examples."""
    epochs, length = 3, 12
    pool = Pool(jnp.zeros((50, 2, 2, 3), jnp.uint8), jnp.arange(50))
    index = jnp.arange(length) + 20  # the last of them are padding

    def step(seen, batch, i):
        assert batch.images.shape == (4, 2, 2, 3)
        targets = jnp.where(batch.mask, batch.targets, -1)
        loss = jnp.sum(jnp.where(batch.mask, batch.targets, 0)) / jnp.sum(batch.mask)
        return seen.at[i].set(targets), {"loss": loss}

    @jax.jit
    def go(size):
        data = ClientData(pool, None, index, size)
        seen = jnp.full((10, 4), -2)
        key = jax.random.key(0)
        return run_epochs(step, seen, data, key, batch_size=4, local_epochs=epochs)

    seen, info = go(jnp.int32(size))
    steps = -(-size // 4)
    seen = np.asarray(seen)
    assert (seen[epochs * steps :] == -2).all()
    orders = set()
    for rows in seen[: epochs * steps].reshape(epochs, -1):
        real = rows[rows >= 0]
        assert rows[: len(real)].tolist() == real.tolist()  # only the last batch is short
        assert sorted(real.tolist()) == list(range(20, 20 + size))
        orders.add(tuple(real.tolist()))
    assert size < 10 or len(orders) == epochs
    assert info["loss"] == pytest.approx(20 + (size - 1) / 2 if size else 0)


def test_public_batches_cycle_through_the_set_in_a_fresh_order():
    """7 images in batches of 3: over 7 steps each is seen 3 times, twice never before all once."""
    pool = PublicPool(
        images=jnp.broadcast_to(jnp.arange(7, dtype=jnp.uint8)[:, None, None, None], (7, 2, 2, 3)),
        labels=jnp.arange(7) + 10,
        answers=jnp.arange(7.0)[:, None] * jnp.ones(4),
    )
    orders = []
    for seed in range(4):
        batch = public_batches(jax.random.key(seed), pool, 3)
        batches = [batch(jnp.int32(step)) for step in range(7)]
        seen = np.concatenate([np.asarray(b.labels) for b in batches]) - 10
        assert sorted(seen[:7].tolist()) == list(range(7))
        assert seen.tolist() == seen[:7].tolist() * 3
        orders.append(tuple(seen[:7].tolist()))
        for b in batches:  # image, label and answer of one example stay together
            assert b.labels is not None and b.answers is not None
            np.testing.assert_allclose(b.images[:, 0, 0, 0], (b.labels - 10) / 127.5 - 1, rtol=1e-6)
            np.testing.assert_array_equal(b.answers[:, 0], b.labels - 10)
    assert len(set(orders)) > 1


def test_a_public_set_smaller_than_its_batch_repeats():
    pool = PublicPool(jnp.zeros((2, 2, 2, 3), jnp.uint8), jnp.arange(2), None)
    batch = public_batches(jax.random.key(0), pool, 5)(jnp.int32(0))
    assert batch.images.shape == (5, 2, 2, 3) and batch.answers is None
    assert sorted(np.asarray(batch.labels)[:2].tolist()) == [0, 1]
