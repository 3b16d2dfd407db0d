"""Makes clients with their splits from examples and their metadata."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.data.partition.fractions import (
    clients_of_sites,
    dropped_by,
    grouped_holdout,
    rng_for,
)
from fedhelp_jax.data.partition.sharing import (
    ALIKE,
    BY_CLASS,
    Sharing,
    partition_like,
    share_out,
    share_out_by_looks,
)
from fedhelp_jax.data.readers.tables import group_of, is_unknown
from fedhelp_jax.data.types import ClientSplit
from fedhelp_jax.settings.schema import COLUMN, SHARINGS

SITE = "site"
GROUP = "group"

logger = logging.getLogger(__name__)


class Column(NamedTuple):
    """A metadata column: the value of example i is ``names[codes[i]]``; code -1 means unknown."""

    codes: np.ndarray
    names: Sequence[str]


def make_column(
    column: str, values: np.ndarray, names: Sequence[str] | None, ids: Sequence[str]
) -> Column:
    """Returns a column in which unknown values have code -1.

    In the column of groups, each example of unknown group gets a group of its own instead.

    Args:
        column: Name of the column.
        values: [n] texts, or class numbers, where TFDS uses -1 for unknown.
        names: Names of the classes; None if the values are texts.
        ids: [n] name of each example.
    """
    if names is not None:
        codes, count = values, len(names)
        unknown = codes < 0
        if column == GROUP and unknown.any():
            codes = np.where(unknown, count + np.cumsum(unknown) - 1, codes)
            names = [*names, *(group_of("", ids[i]) for i in np.flatnonzero(unknown).tolist())]
        return Column(codes, list(names))
    texts = values.tolist()
    if column == GROUP:
        texts = [group_of(text, identity) for text, identity in zip(texts, ids, strict=True)]
    unknown = np.array([is_unknown(text) for text in texts])
    known, codes = np.unique(np.array(texts)[~unknown], return_inverse=True)
    every = np.full(len(texts), -1)
    every[~unknown] = codes
    return Column(every, known.tolist())


class Examples(NamedTuple):
    """All examples of a data set.

    Attributes:
        images: [n, *spatial, C], used to cluster by appearance.
        labels: int [n] classes; None if labels are masks.
        groups: [n] patient or lesion, which stays on one side of a split and with one client.
        is_test: bool [n] the official split, or None.
        columns: Further metadata, including "site" if there are sites.
        names: [n] name of each example, for messages.
    """

    images: np.ndarray
    labels: np.ndarray | None
    groups: np.ndarray
    is_test: np.ndarray | None
    columns: Mapping[str, Column]
    names: Sequence[str] = ()


class Splitting(NamedTuple):
    """How a client's examples are split; the fields are settings of `data` or the run's `seed`."""

    split: str
    validation_fraction: float
    test_fraction: float
    max_train: int | None
    seed: int


def make_clients(
    examples: Examples, sharing: Sharing, splitting: Splitting, *, name: str, where: str
) -> tuple[ClientSplit, ...]:
    """Returns the clients and their splits, according to `sharing.by`.

    - "site": one client per site.
    - "column:NAME": one client per value. Values with fewer than `min_examples` examples, or
      without an example in each split, are left out with a warning.
    - "column:group": one client per patient, whose examples are then each a group of their own.
    - Otherwise, `share_out` assigns whole groups. Examples of an official test split are assigned
      so that they resemble each client's training examples.

    If there is no official split, `test_fraction` of each client's examples are held out for
    testing, by groups and at least one group.

    Args:
        examples: The examples.
        sharing: How examples are assigned to clients.
        splitting: How each client's examples are split.
        name: Name of the data set, on which the random draws depend.
        where: Key and data set, for messages.

    Raises:
        UserError: The examples lack the column that `sharing.by` names, or a client would have no
            training or no test example.
    """
    groups, is_test = examples.groups, examples.is_test
    # Examples that the split leaves out do not count for any client.
    dropped = np.zeros(len(groups), bool)
    if is_test is not None:
        dropped = dropped_by(splitting.split, groups, is_test)
    by = sharing.by or (SITE if SITE in examples.columns else "fractions")
    if by == SITE or by.startswith(COLUMN):
        column = by.removeprefix(COLUMN)
        if column == GROUP:
            examples = examples._replace(groups=np.arange(len(examples.groups)))
            dropped = np.zeros(len(dropped), bool)
        owner, names = _by_column(examples, column, dropped, sharing, where)
    elif by in SHARINGS:
        owner = _shared_out(examples, dropped, sharing._replace(by=by), splitting.seed, name, where)
        names = [f"client_{number}" for number in range(owner.max() + 1)]
    else:
        raise UserError(
            f"data.split_by must be one of {', '.join(SHARINGS)}, {SITE} or {COLUMN}NAME, got "
            f"{by!r}"
        )
    is_test = examples.is_test
    if is_test is not None and splitting.split == "official":
        _warn_of_leaks(examples.groups, is_test, where)
    if is_test is None:
        is_test = _held_out(owner, examples.groups, splitting)
        splitting = splitting._replace(split="grouped")  # drawn splits are always by group
    return clients_of_sites(
        owner,
        lambda number: names[number],
        is_test=is_test,
        groups=examples.groups,
        split=splitting.split,
        validation_fraction=splitting.validation_fraction,
        max_train=splitting.max_train,
        seed=splitting.seed,
        where=where,
    )


def _warn_of_leaks(groups: np.ndarray, is_test: np.ndarray, where: str) -> None:
    """Warns if the official split has images of one patient or lesion on both sides."""
    leaks = len(np.unique(groups[dropped_by("grouped", groups, is_test)]))
    if leaks:
        logger.warning(
            "%s: the official split has %d groups (patients or lesions) with images in both train "
            "and test; data.split=grouped drops them from train",
            where,
            leaks,
        )


def _by_column(
    examples: Examples, column: str, dropped: np.ndarray, sharing: Sharing, where: str
) -> tuple[np.ndarray, list[str]]:
    """Returns the client of each example, -1 if it has none, and the clients' names."""
    if column not in examples.columns:
        known = list(examples.columns)
        raise UserError(
            f"{where} has no {column}, which data.split_by needs; it has "
            f"{', '.join(known) or 'nothing of that kind'}{suggest(column, known)}"
        )
    codes, names = examples.columns[column]
    unknown = np.flatnonzero(codes < 0)
    if len(unknown):
        first = examples.names[unknown[0]] if examples.names else f"example {unknown[0]}"
        said = f"{len(unknown)} of {len(codes)} examples are of unknown {column}, such as {first}"
        if column == SITE:
            raise UserError(
                f"{where}: {said}; name their site, or set data.split_by to share examples out "
                "in another way"
            )
        logger.warning("data.split_by: %s: left out", said)
    if column == SITE:
        return codes, list(names)  # a hospital that is too small is refused, never left out

    def counts(of: np.ndarray) -> np.ndarray:
        return np.bincount(of[of >= 0], minlength=len(names))  # -1 is unknown

    if examples.is_test is None:
        # At least two groups are needed, so that one can be held out for testing.
        groups = np.unique(np.stack([codes, examples.groups]), axis=1)[0]
        enough = (counts(codes) > sharing.min_examples) & (counts(groups) > 1)
    else:
        trains = counts(codes[~examples.is_test & ~dropped])
        tests = counts(codes[examples.is_test])
        enough = (trains >= sharing.min_examples) & (tests > 0)
    present = counts(codes) > 0
    lacking = int((present & ~enough).sum())
    if not enough.any():
        raise UserError(
            f"{where}: no value of {column} has data.min_examples = {sharing.min_examples} to "
            f"train on and one to test on; there are {present.sum()} values"
        )
    if lacking:
        logger.warning(
            "data.split_by: %d of %d values of %s have too few examples: left out",
            lacking,
            present.sum(),
            column,
        )
    return np.where((codes >= 0) & enough[codes], codes, -1), [str(name) for name in names]


def _shared_out(
    examples: Examples,
    dropped: np.ndarray,
    sharing: Sharing,
    seed: int,
    name: str,
    where: str,
) -> np.ndarray:
    """Returns the client of each example, -1 if it is dropped."""
    total = len(examples.groups)
    labels = examples.labels
    if labels is None and sharing.by in BY_CLASS:
        raise UserError(
            f"data.split_by = {sharing.by!r} needs a class of each image, and {where} has masks"
        )
    labels = np.zeros(total, int) if labels is None else labels
    is_test = examples.is_test
    train = np.arange(total) if is_test is None else np.flatnonzero(~is_test & ~dropped)
    test = np.arange(0) if is_test is None else np.flatnonzero(is_test)
    if is_test is None:
        # One more example is needed for testing.
        sharing = sharing._replace(min_examples=sharing.min_examples + 1)
    train_rng, test_rng = rng_for(seed, f"{name} train"), rng_for(seed, f"{name} test")
    if sharing.by == "clusters":
        used = np.concatenate([train, test])
        owner = np.full(total, -1)
        owner[used] = share_out_by_looks(
            examples.images[used],
            np.isin(used, test),
            sharing,
            train_rng,
            examples.groups[used],
        )
        return owner
    trains = share_out(labels[train], sharing, train_rng, examples.groups[train])
    if not len(test):
        tests = [test] * len(trains)
    elif sharing.by in ALIKE:
        few = sharing._replace(min_examples=1)
        tests = share_out(labels[test], few, test_rng, examples.groups[test])
    else:
        like = [labels[train[own]] for own in trains]
        tests = partition_like(like, labels[test], test_rng, examples.groups[test])
    owner = np.full(total, -1)
    for client, (own, own_test) in enumerate(zip(trains, tests, strict=True)):
        owner[train[own]] = client
        owner[test[own_test]] = client
    return owner


def _held_out(owner: np.ndarray, groups: np.ndarray, splitting: Splitting) -> np.ndarray:
    """Returns which examples are for testing, bool [n]: a part of each client's, by its groups."""
    is_test = np.zeros(len(owner), bool)
    for client in np.unique(owner[owner >= 0]).tolist():
        own = np.flatnonzero(owner == client)
        fraction = max(splitting.test_fraction, 1 / len(own))
        rng = rng_for(splitting.seed, "test", client)
        is_test[own] = grouped_holdout(groups[own], fraction, rng)
    return is_test
