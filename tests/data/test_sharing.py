"""Examples are shared out as the formulas say, all of them, and no draw goes on for ever."""

import csv
import itertools

import numpy as np
import pytest
from commands import refusal, train
from helpers import use_tiny_networks

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.partition import sharing as sharings
from fedhelp_jax.data.partition.fractions import partition, rng_for
from fedhelp_jax.data.partition.sharing import (
    Sharing,
    partition_like,
    share_out,
    share_out_by_looks,
    thumbnail_features,
    units_of,
)
from fedhelp_jax.settings.schema import SHARINGS

LABELS = np.repeat(np.arange(5), [400, 300, 200, 60, 40])
EQUAL = Sharing(fractions=(0.25,) * 4, num_clients=4)


def rng(seed=0):
    return rng_for(seed, "test")


def counts(parts, labels=LABELS):
    return np.array([np.bincount(labels[part], minlength=5) for part in parts])


def assert_partition(parts, total):
    assert all(part.dtype == np.int32 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(total))


@pytest.mark.parametrize("by", [by for by in SHARINGS if by != "clusters"])
def test_everyone_gets_some_all_are_given_and_the_seed_decides(by):
    how = EQUAL._replace(by=by, min_examples=5)
    parts = share_out(LABELS, how, rng())
    assert len(parts) == 4 and min(map(len, parts)) >= 5
    assert_partition(parts, len(LABELS))
    again, other = share_out(LABELS, how, rng()), share_out(LABELS, how, rng(1))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_fractions_are_the_partition_by_fractions():
    expected = partition(len(LABELS), EQUAL.fractions, rng())
    for a, b in zip(share_out(LABELS, EQUAL, rng()), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_dirichlet_share_has_the_mean_and_variance_of_the_formula():
    """Of a class of n, client k gets p n: mean 1/K, variance (1/K)(1 - 1/K)/(K alpha + 1)."""
    labels = np.zeros(10000, int)
    for alpha in (0.5, 5.0):
        how = Sharing("dirichlet", num_clients=4, dirichlet_alpha=alpha)
        draws = [len(share_out(labels, how, rng(seed))[0]) / 10000 for seed in range(600)]
        # With a minimum of one example next to nothing is drawn again.
        assert np.mean(draws) == pytest.approx(0.25, abs=0.04)
        assert np.var(draws) == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.25)


def test_a_small_alpha_makes_classes_unlike_and_a_large_one_alike():
    spread = {}
    for alpha in (0.1, 1000.0):
        found = counts(
            share_out(LABELS, EQUAL._replace(by="dirichlet", dirichlet_alpha=alpha), rng())
        )
        spread[alpha] = (found / found.sum(0)).std(0).mean()
    assert spread[1000.0] < 0.03 < 0.25 < spread[0.1]


def test_quantity_makes_sizes_unlike_and_classes_alike():
    found = counts(share_out(LABELS, EQUAL._replace(by="quantity", dirichlet_alpha=0.3), rng(2)))
    sizes = found.sum(1)
    assert sizes.max() > 3 * sizes.min()
    large = sizes > 100
    np.testing.assert_allclose(
        found[large] / sizes[large, None],
        np.tile(np.bincount(LABELS) / 1000, (large.sum(), 1)),
        atol=0.1,
    )


def test_shards_give_a_client_few_classes():
    labels = np.repeat(np.arange(8), 50)
    parts = share_out(labels, Sharing("shards", num_clients=4, shards_per_client=2), rng())
    assert_partition(parts, 400)
    assert {len(part) for part in parts} == {100}
    assert all(len(np.unique(labels[part])) <= 2 for part in parts)


def test_a_draw_that_cannot_end_is_refused_and_a_tiny_alpha_draws_a_corner():
    how = Sharing("dirichlet", num_clients=4, dirichlet_alpha=1e-6, min_examples=1)
    with pytest.raises(
        UserError, match=r"data.dirichlet_alpha = 1e-06: in 100 draws .*min_examples = 1 of"
    ):
        share_out(np.zeros(50, int), how, rng())
    corner = sharings._dirichlet(1e-9, 4, rng())
    assert sorted(corner) == [0, 0, 0, 1]


@pytest.mark.parametrize("by", [by for by in SHARINGS if by != "clusters"])
def test_groups_stay_whole(by):
    """Of 300 patients with one to five images each."""
    groups = np.repeat(rng().permutation(300), rng().integers(1, 6, 300))
    labels = rng(1).integers(0, 5, len(groups))
    how = EQUAL._replace(by=by, dirichlet_alpha=5.0, shards_per_client=4)
    parts = share_out(labels, how, rng(2), groups)
    assert_partition(parts, len(groups))
    owners = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, owners)) == 300
    if by in ("fractions", "iid"):
        # A client's size is off by less than the largest group.
        assert max(abs(len(part) - len(groups) / 4) for part in parts) < 5
    tests = partition_like([labels[part] for part in parts], labels, rng(3), groups)
    assert_partition(tests, len(groups))
    assert sum(len(set(groups[part].tolist())) for part in tests) == 300


def test_groups_are_cut_where_it_is_nearest():
    """No client is always the smallest, and few groups go round."""
    groups = np.repeat(np.arange(20), 20)
    how = Sharing("iid", num_clients=6)
    sizes = [
        [len(part) for part in share_out(np.zeros(400, int), how, rng(seed), groups)]
        for seed in range(50)
    ]
    assert np.abs(np.array(sizes) - 400 / 6).max() <= 20
    for seed in range(50):
        share_out(np.zeros(160, int), how, rng(seed), groups[:160])  # eight groups


def test_a_group_is_of_its_most_frequent_class():
    groups, labels = np.array([7, 7, 2, 7, 2, 5]), np.array([1, 0, 2, 0, 1, 3])
    units = units_of(groups, labels)
    np.testing.assert_array_equal(units.of, [0, 0, 1, 0, 1, 2])
    np.testing.assert_array_equal(units.sizes, [3, 2, 1])
    np.testing.assert_array_equal(units.labels, [0, 1, 3])


def test_groups_too_large_to_share_out_are_refused():
    groups = np.array([0] * 20 + [1])
    how = Sharing("iid", num_clients=2, min_examples=3)
    with pytest.raises(UserError, match="21 examples in 2 groups leave one of 2 clients"):
        share_out(np.zeros(21, int), how, rng(), groups)


def pictures(kinds):
    """Grey images of a few thumbnail_features, with noise."""
    draw = np.random.default_rng(0)
    base = draw.uniform(40, 210, (max(kinds) + 1, 12, 10, 1))
    noise = draw.normal(0, 3, (len(kinds), 12, 10, 1))
    return (base[kinds] + noise).clip(0, 255).astype(np.uint8)


def test_clusters_are_images_that_look_alike():
    kinds = np.repeat([0, 1, 2], [50, 30, 20])[np.random.default_rng(1).permutation(100)]
    is_test = np.arange(100) % 4 == 0
    how = Sharing("clusters", num_clients=3)
    owner = share_out_by_looks(pictures(kinds), is_test, how, rng(), np.arange(100))
    # The largest first; test images are with those that they look like.
    np.testing.assert_array_equal(owner, kinds)
    again = share_out_by_looks(pictures(kinds), is_test, how, rng(), np.arange(100))
    np.testing.assert_array_equal(owner, again)


def test_clusters_keep_groups_whole_and_are_refused_where_one_would_be_too_small():
    kinds = np.repeat([0, 1], [40, 3])
    images, is_test = pictures(kinds), np.zeros(43, bool)
    groups = np.arange(43) // 5
    how = Sharing("clusters", num_clients=2, min_examples=3)
    owner = share_out_by_looks(images, is_test, how, rng(), groups)
    assert all(len(np.unique(owner[groups == group])) == 1 for group in np.unique(groups))
    with pytest.raises(UserError, match=r"in 20 draws some of 2 clusters .*min_examples = 25"):
        how = how._replace(min_examples=25)
        share_out_by_looks(images, is_test, how, rng(), np.arange(43))


def test_looks_are_means_of_cells():
    images = np.random.default_rng(0).integers(0, 256, (5, 19, 3, 2), dtype=np.uint8)
    cuts = np.arange(9) * 19 // 8
    expected = [
        images[:, a:b, column].astype(float).mean(1)
        for a, b in itertools.pairwise(cuts)
        for column in range(3)
    ]
    np.testing.assert_allclose(thumbnail_features(images), np.concatenate(expected, 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Sharing("quantity", num_clients=6, min_examples=2), "11 examples are too few for 6"),
        # Of eight pieces three are larger, and here the other client has them all.
        (
            Sharing("shards", num_clients=2, shards_per_client=4, min_examples=5),
            "pieces of 4 a client: 11 examples leave one of 2 clients with fewer than 5",
        ),
        (
            Sharing("shards", num_clients=4, shards_per_client=2**30),
            "data.shards_per_client = 1073741824: 11 examples are too few for 4 clients",
        ),
        (Sharing("site"), "data.split_by must be one of fractions, iid"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(how, words):
    with pytest.raises(UserError, match=words):
        share_out(np.zeros(11, int), how, rng(15))


def test_test_examples_follow_the_classes_of_training():
    train = [np.array([0] * 30 + [1] * 10), np.array([0] * 10 + [1] * 30), np.array([2])]
    labels = np.repeat([0, 1, 2, 3], [40, 80, 5, 6])
    parts = partition_like(train, labels, rng())
    assert_partition(parts, len(labels))
    found = np.array([np.bincount(labels[part], minlength=4) for part in parts])
    np.testing.assert_array_equal(found, [[30, 20, 0, 2], [10, 60, 0, 2], [0, 0, 5, 2]])


def test_everyone_gets_a_test_example():
    parts = partition_like([np.array([0]), np.array([0] * 999)], np.zeros(3, int), rng())
    assert sorted(map(len, parts)) == [1, 2]
    with pytest.raises(UserError, match="1 test examples are too few for 2 clients"):
        partition_like([np.array([0])] * 2, np.zeros(1, int), rng())


@pytest.mark.slow
def test_a_run_shows_who_has_what(tmp_path, monkeypatch):
    """A table of all splits, and a picture; the classes of a client are alike in all."""
    use_tiny_networks(monkeypatch)
    draw = np.random.default_rng(0)
    arrays = {}
    for part, size in {"train": 200, "val": 40, "test": 80}.items():
        arrays[f"{part}_images"] = draw.integers(0, 256, (size, 8, 8), dtype=np.uint8)
        arrays[f"{part}_labels"] = draw.integers(0, 2, (size, 1), dtype=np.uint8)
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    flags = {
        "data.name": "medmnist",
        "data.path": tmp_path / "pneumoniamnist.npz",
        "data.split_by": "dirichlet",
        "data.num_clients": 3,
        "data.min_examples": 5,
        "algorithm.name": "fedavg",
        "rounds": 1,
    }
    rest = " ".join(f"--config.{key}={value}" for key, value in flags.items())
    assert train(tmp_path / "run", rest) == 0
    with (tmp_path / "run" / "shares.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["client"], row["split"]) for row in rows[:3]] == [
        ("client_0", "train"),
        ("client_0", "validation"),
        ("client_0", "test"),
    ]
    totals = dict.fromkeys(("train", "validation", "test"), 0)
    for row in rows:
        assert int(row["normal"]) + int(row["pneumonia"]) == int(row["examples"])
        totals[row["split"]] += int(row["examples"])
    assert totals["train"] + totals["validation"] == 240 and totals["test"] == 80
    for train_row, test_row in zip(rows[::3], rows[2::3], strict=True):
        shares = [int(row["normal"]) / int(row["examples"]) for row in (train_row, test_row)]
        assert shares[0] == pytest.approx(shares[1], abs=0.15)
    assert (tmp_path / "run" / "shares.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "by", "right"),
    [
        ("phantoms", "dirichlet", "fractions"),
        ("medmnist", "site", "fractions or iid or quantity or dirichlet or shards or clusters"),
    ],
)
def test_what_a_data_set_cannot_be_split_by_is_refused(capsys, tmp_path, name, by, right):
    code = train(
        tmp_path, f"--config.data.name={name} --config.data.split_by={by} --config.data.path=x"
    )
    assert f"is not for data {name}: it must be {right}" in refusal(capsys, code)
