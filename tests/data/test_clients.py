"""From what is known of examples to clients: whole groups, official splits, metadata columns."""

import logging

import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.partition.clients import Column, Examples, Splitting, make_clients
from fedhelp_jax.data.partition.sharing import Sharing
from fedhelp_jax.settings.schema import SHARINGS

# 240 images of 80 patients, three each, at three hospitals.
PATIENT = np.repeat(np.arange(80), 3)
SITE = np.repeat([0, 1, 2], [150, 60, 30])
LABELS = np.random.default_rng(0).integers(0, 3, 240)
IMAGES = np.random.default_rng(1).integers(0, 256, (240, 4, 4, 1), dtype=np.uint8)
COLUMNS = {
    "site": Column(SITE, ["north", "south", "west"]),
    "group": Column(PATIENT, [f"p{number}" for number in range(80)]),
    "sex": Column(PATIENT % 2, ["f", "m"]),
}
EXAMPLES = Examples(IMAGES, LABELS, PATIENT, None, COLUMNS)
SPLITTING = Splitting("grouped", 0.1, 0.25, None, 0)


def made(by, examples=EXAMPLES, splitting=SPLITTING, **sharing):
    how = Sharing(by, (0.5, 0.3, 0.2), num_clients=3, dirichlet_alpha=5.0, **sharing)
    return make_clients(examples, how, splitting, name="toy", where="data.name: toy")


def assert_sound(clients, total=240):
    """Nobody has an example twice, and no patient stands on two sides or with two clients."""
    all_parts = [part for client in clients for part in client[1:]]
    together = np.concatenate(all_parts)
    assert len(np.unique(together)) == len(together) == total
    patients = [set(PATIENT[part].tolist()) for part in all_parts]
    assert sum(map(len, patients)) == len(set.union(*patients))
    assert all(len(client.train) and len(client.test) for client in clients)


@pytest.mark.parametrize("by", [*SHARINGS, "site", "column:sex", None])
def test_patients_stay_on_one_side_and_with_one_client(by):
    clients = made(by)
    assert_sound(clients)
    for client in clients:
        size = sum(map(len, client[1:]))
        assert abs(len(client.test) - 0.25 * size) <= 3
    names = {"site": ("north", "south", "west"), None: ("north", "south", "west")}
    names["column:sex"] = ("f", "m")
    expected = names.get(by, ("client_0", "client_1", "client_2"))
    assert tuple(client.name for client in clients) == expected
    other = made(by, splitting=SPLITTING._replace(seed=1))
    assert any(
        not np.array_equal(a.test, b.test) for a, b in zip(clients, other, strict=True)
    )  # the seed decides


@pytest.mark.parametrize("by", [*SHARINGS, "site", "column:sex"])
def test_an_official_split_is_kept(by):
    official = PATIENT % 5 == 0
    clients = made(by, EXAMPLES._replace(is_test=official))
    assert_sound(clients)
    for client in clients:
        assert official[client.test].all()
        assert not official[client.train].any() and not official[client.validation].any()


def test_training_examples_of_tested_patients_are_dropped_unless_official():
    official = np.arange(240) % 10 == 0  # cuts patients
    examples = EXAMPLES._replace(is_test=official)
    clients = made("site", examples)
    kept = np.concatenate([np.r_[client.train, client.validation] for client in clients])
    assert not set(PATIENT[kept]) & set(PATIENT[official])
    clients = made("site", examples, SPLITTING._replace(split="official"))
    assert sum(len(part) for client in clients for part in client[1:]) == 240


@pytest.mark.parametrize("by", SHARINGS)
def test_dropped_examples_count_for_nobody(by):
    """An official split that cuts patients: the minimum is of those that are trained on."""
    official = (np.arange(240) % 3 == 0) & (PATIENT % 4 == 0)
    how = {"min_examples": 30}
    clients = made(by, EXAMPLES._replace(is_test=official), **how)
    sizes = [len(client.train) + len(client.validation) for client in clients]
    assert min(sizes) >= 30 and sum(sizes) == 180  # of 60 patients who are not tested
    if by == "iid":
        assert max(sizes) - min(sizes) <= 3


def test_values_of_one_group_or_unknown_are_left_out(caplog):
    codes = np.where(PATIENT == 0, 2, PATIENT % 2)  # a value that one patient alone has
    codes[-3:] = -1
    columns = COLUMNS | {"ward": Column(codes, ["a", "b", "c"])}
    with caplog.at_level(logging.WARNING):
        clients = made("column:ward", EXAMPLES._replace(columns=columns))
    assert [client.name for client in clients] == ["a", "b"]
    assert sum(len(part) for client in clients for part in client[1:]) == 234
    assert "1 of 3 values of ward have too few examples" in caplog.text


def test_a_column_that_cuts_patients_leaves_nobody_on_both_sides():
    columns = COLUMNS | {"label": Column(LABELS, ["x", "y", "z"])}
    for split in ("grouped", "official"):
        examples = EXAMPLES._replace(columns=columns)
        clients = made("column:label", examples, SPLITTING._replace(split=split))
        train, test = (
            np.concatenate([np.concatenate(parts) for parts in sides])
            for sides in (
                [(c.train, c.validation) for c in clients],
                [(c.test,) for c in clients],
            )
        )
        assert len(train) and not set(PATIENT[train]) & set(PATIENT[test])


def test_a_client_a_patient(caplog):
    """Then a patient's images are on both sides, knowingly; who has too few is left out."""
    patients = np.repeat(np.arange(30), [1] * 10 + [6] * 20)
    columns = {"group": Column(patients, [f"p{number}" for number in range(30)])}
    examples = Examples(IMAGES[:130], LABELS[:130], patients, None, columns)
    with caplog.at_level(logging.WARNING):
        clients = made("column:group", examples)
    assert [client.name for client in clients] == [f"p{number}" for number in range(10, 30)]
    assert {len(client.test) for client in clients} == {1}
    assert "10 of 30 values of group have too few examples: left out" in caplog.text


def test_masks_are_shared_out_but_not_by_class():
    masks = EXAMPLES._replace(labels=None)
    assert_sound(made("quantity", masks))
    for by in ("dirichlet", "shards"):
        with pytest.raises(UserError, match=f"'{by}' needs a class of each image.*toy has masks"):
            made(by, masks)


def test_what_is_not_known_is_refused():
    with pytest.raises(
        UserError, match=r"toy has no sx, which.*site, group, sex; did you mean sex"
    ):
        made("column:sx")
    with pytest.raises(UserError, match="has no site, which.*it has nothing of that kind"):
        made("site", EXAMPLES._replace(columns={}))
    with pytest.raises(UserError, match="split_by must be one of fractions, iid.*got 'hospital'"):
        made("hospital")
    with pytest.raises(UserError, match="no value of sex has data.min_examples = 200"):
        made("column:sex", min_examples=200)


def test_without_sites_clients_are_made_by_fractions():
    clients = made(None, EXAMPLES._replace(columns={}))
    sizes = [sum(map(len, client[1:])) for client in clients]
    assert np.abs(np.array(sizes) - [120, 72, 48]).max() <= 3


def test_examples_of_an_unknown_value_are_left_out_with_a_word(caplog):
    codes = np.where(np.arange(240) < 30, -1, PATIENT % 2)
    columns = COLUMNS | {"sex": Column(codes, ["f", "m"])}
    with caplog.at_level(logging.WARNING):
        clients = made("column:sex", EXAMPLES._replace(columns=columns))
    assert "30 of 240 examples are of unknown sex, such as example 0: left out" in caplog.text
    assert [client.name for client in clients] == ["f", "m"]
    assert min(part.min() for client in clients for part in client[1:]) >= 30


def test_a_client_tests_on_one_group_at_least():
    """A quarter of three images is less than one."""
    sites = Column(np.repeat([0, 1], [9, 3]), ["large", "tiny"])
    examples = Examples(IMAGES[:12], LABELS[:12], np.arange(12), None, {"site": sites})
    large, tiny = made("site", examples)
    assert (len(large.test), len(tiny.test)) == (2, 1)
