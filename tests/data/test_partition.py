import subprocess
import sys

import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.partition.fractions import (
    grouped_holdout,
    partition,
    rng_for,
    split_sizes,
    split_validation,
)

FRACTIONS = (0.60, 0.20, 0.08, 0.06, 0.04, 0.02)


def test_draws_depend_on_seed_purpose_and_client_alone():
    draws = {
        (seed, purpose, client): rng_for(seed, purpose, client).random()
        for seed in (0, 1, 2**32 - 1)
        for purpose in ("a", "b")
        for client in (0, 1)
    }
    assert len(set(draws.values())) == len(draws)
    assert all(rng_for(*key).random() == value for key, value in draws.items())


def test_draws_are_the_same_in_every_process():
    # `hash` of a string is not.
    module = "fedhelp_jax.data.partition.fractions"
    code = f"from {module} import rng_for; print(rng_for(0, 'word', 1).random())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert float(result.stdout) == rng_for(0, "word", 1).random()


@pytest.mark.parametrize("total", [6, 7, 50, 1600, 4999])
def test_sizes_sum_and_nobody_is_left_out(total):
    sizes = split_sizes(total, FRACTIONS)
    assert sum(sizes) == total
    assert min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)


def test_sizes_follow_the_fractions():
    assert split_sizes(1600, FRACTIONS) == [960, 320, 128, 96, 64, 32]
    assert split_sizes(3, (1 / 3,) * 3) == [1, 1, 1]
    assert split_sizes(8, (0.9, 0.05, 0.05), minimum=2) == [4, 2, 2]


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2), (1.0, 0.0), (np.nan, 1.0)])
def test_fractions_that_are_no_shares(fractions):
    with pytest.raises(UserError, match="data.fractions must be positive numbers with sum 1"):
        split_sizes(100, fractions)


def test_fewer_examples_than_clients():
    with pytest.raises(UserError, match="data.fractions: 5 examples are too few for 6 clients"):
        split_sizes(5, FRACTIONS)


def test_partition_deals_every_example_once():
    parts = partition(997, FRACTIONS, rng_for(3, "p"))
    assert [len(part) for part in parts] == split_sizes(997, FRACTIONS)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(997))
    assert all(np.all(np.diff(part) > 0) and part.dtype == np.int32 for part in parts)
    again, other = (
        partition(997, FRACTIONS, rng_for(3, "p")),
        partition(997, FRACTIONS, rng_for(4, "p")),
    )
    assert all(map(np.array_equal, parts, again))
    assert not all(map(np.array_equal, parts, other))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [1, 2, 9, 10, 31, 400])
def test_no_group_stands_on_both_sides(count, seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, max(1, count // 2), count)
    held_out = grouped_holdout(groups, 0.1, rng_for(seed, "v"))
    assert not set(groups[held_out]) & set(groups[~held_out])
    assert (~held_out).any()
    if count < 10:
        assert not held_out.any()
    elif len(set(groups)) > 1:
        assert held_out.any()
    if count == 400:
        assert 36 <= held_out.sum() <= 40


def test_holdout_with_groups_that_do_not_fit():
    # 10 examples, one to hold out, groups of 6 and 4: the smaller one, rather than none.
    groups = np.array([0] * 6 + [1] * 4)
    assert np.array_equal(grouped_holdout(groups, 0.1, rng_for(0, "v")), groups == 1)
    assert not grouped_holdout(np.zeros(50, int), 0.1, rng_for(0, "v")).any()
    assert not grouped_holdout(np.arange(50), 0.0, rng_for(0, "v")).any()


def test_cap_on_training_leaves_validation_as_it_is():
    def of(max_train, client=0):
        return split_validation(
            np.arange(100, 300),
            np.arange(200) // 3,
            validation_fraction=0.1,
            max_train=max_train,
            seed=5,
            client=client,
        )

    train, validation = of(None)
    assert sorted([*train, *validation]) == list(range(100, 300))
    assert 18 <= len(validation) <= 20
    few, same = of(7)
    assert np.array_equal(same, validation)
    assert len(few) == 7 and set(few) <= set(train)
    assert np.all(np.diff(few) > 0)
    assert np.array_equal(of(1000)[0], train)
    assert not np.array_equal(of(None, client=1)[1], validation)
    with pytest.raises(UserError, match="data.max_train must be at least 1, got 0"):
        of(0)


def test_the_largest_remainder_is_rounded_up():
    assert split_sizes(10, (0.55, 0.25, 0.20)) == [6, 2, 2]
    assert split_sizes(10, (0.21, 0.52, 0.27)) == [2, 5, 3]
