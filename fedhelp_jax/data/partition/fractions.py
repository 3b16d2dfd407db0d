"""Seeded splits of examples among clients, and of a client's examples into train and validation."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import ClientSplit


def rng_for(seed: int, purpose: str, client: int = 0) -> np.random.Generator:
    """Returns a generator that depends only on the three arguments, not on draws made elsewhere.

    >>> bool(rng_for(0, "a", 1).random() == rng_for(0, "a", 1).random())
    True
    """
    # Not `hash`, whose value for a string differs between processes.
    word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(word, client)))


def split_sizes(total: int, fractions: Sequence[float], minimum: int = 1) -> list[int]:
    """Returns how many of `total` examples each client gets.

    Rounds by largest remainder, then brings clients up to `minimum` at the expense of the largest.

    Args:
        total: Number of examples.
        fractions: Each client's share; positive, with sum 1.
        minimum: Minimum number of examples per client.

    Returns:
        Sizes that sum to `total`.

    Raises:
        UserError: The fractions are not positive with sum 1, or `total` is too small.

    >>> split_sizes(10, (0.90, 0.06, 0.04))
    [8, 1, 1]
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.size == 0 or not np.all(shares > 0) or abs(shares.sum() - 1) > 1e-6:
        raise UserError(
            f"data.fractions must be positive numbers with sum 1, got {tuple(fractions)}"
        )
    if total < minimum * len(shares):
        raise UserError(
            f"data.fractions: {total} examples are too few for {len(shares)} clients "
            f"of at least {minimum}"
        )
    exact = shares * total
    sizes = np.floor(exact + 1e-9).astype(int)
    # Stable, so that ties go to the first clients on every machine.
    order = np.argsort(-(exact - sizes), kind="stable")
    sizes[order[: total - sizes.sum()]] += 1
    while sizes.min() < minimum:
        sizes[np.argmin(sizes)] += 1
        sizes[np.argmax(sizes)] -= 1
    return sizes.tolist()


def partition(
    total: int, fractions: Sequence[float], rng: np.random.Generator, minimum: int = 1
) -> list[np.ndarray]:
    """Returns the clients' indices: an IID split of `range(total)` by `fractions`.

    Returns:
        One sorted int32 array per client. The arrays are disjoint and have at least `minimum`
        entries each.

    Raises:
        UserError: As in `split_sizes`.
    """
    sizes = split_sizes(total, fractions, minimum)
    order = rng.permutation(total).astype(np.int32)
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def grouped_holdout(groups: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Returns which examples to hold out so that no group is on both sides.

    Goes through the groups in random order and takes those that still fit into `fraction` of the
    examples. If none fits, the smallest is taken; if there is only one group, none is.

    Args:
        groups: [n] group (patient, lesion) of each example.
        fraction: Share of the examples to hold out, rounded down.
        rng: Source of the random order.

    Returns:
        bool [n], True for held-out examples; never all of them.
    """
    remaining = int(np.floor(len(groups) * fraction + 1e-9))
    if remaining == 0:
        return np.zeros(len(groups), bool)
    _, members, counts = np.unique(groups, return_inverse=True, return_counts=True)
    taken = np.zeros(len(counts), bool)
    order = rng.permutation(len(counts))
    for group in order[:-1]:
        if counts[group] <= remaining:
            taken[group] = True
            remaining -= counts[group]
    if not taken.any() and len(counts) > 1:
        taken[order[np.argmin(counts[order])]] = True
    return taken[members]


def split_validation(
    train: np.ndarray,
    groups: np.ndarray,
    *,
    validation_fraction: float,
    max_train: int | None,
    seed: int,
    client: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns one client's training examples as (train, validation).

    Args:
        train: [n] indices into the pool.
        groups: [n] group of each of them.
        validation_fraction: Share to hold out, by groups.
        max_train: Maximum number of training examples; None keeps all. They are drawn after the
            holdout, so that the validation split does not depend on this limit.
        seed: The run's seed.
        client: Number that identifies this client in the random draws.

    Returns:
        Two sorted int32 arrays.
    """
    held_out = grouped_holdout(groups, validation_fraction, rng_for(seed, "validation", client))
    kept, validation = train[~held_out], train[held_out]
    if max_train is not None and len(kept) > max_train:
        if max_train < 1:
            raise UserError(f"data.max_train must be at least 1, got {max_train}")
        kept = rng_for(seed, "max_train", client).choice(kept, max_train, replace=False)
    return np.sort(kept).astype(np.int32), np.sort(validation).astype(np.int32)


def dropped_by(split: str, groups: np.ndarray, is_test: np.ndarray) -> np.ndarray:
    """Returns which training examples a split drops, bool [n].

    Args:
        split: "official" drops none; "grouped" drops those whose group has test examples.
        groups: [n] group (lesion, patient) of each example.
        is_test: bool [n] the official split.
    """
    return np.isin(groups, groups[is_test]) & ~is_test & (split == "grouped")


def clients_of_sites(
    sites: np.ndarray,
    name: Callable[[int], str],
    *,
    is_test: np.ndarray,
    groups: np.ndarray,
    split: str,
    validation_fraction: float,
    max_train: int | None,
    seed: int,
    where: str,
) -> tuple[ClientSplit, ...]:
    """Returns one client per site, in the order of the sites' numbers.

    Args:
        sites: int [n] site of each example; -1 if it belongs to no client.
        name: Returns the name of a site from its number.
        is_test: bool [n] the official split.
        groups: [n] group (lesion, patient) of each example.
        split: "official" keeps that split; "grouped" drops training examples whose group has
            test examples, at any site.
        validation_fraction: Share of a site's training examples held out, by group.
        max_train: Maximum number of training examples per site; None keeps all.
        seed: The run's seed.
        where: Key and data set, which begin the messages.

    Raises:
        UserError: A site has no training or no test example.
    """
    # Dropped examples stay in the pool, since they are still private and must not become public.
    dropped = dropped_by(split, groups, is_test)
    clients = []
    for site in np.unique(sites[sites >= 0]).tolist():
        train = np.flatnonzero((sites == site) & ~is_test & ~dropped)
        test = np.flatnonzero((sites == site) & is_test).astype(np.int32)
        if not len(train) or not len(test):
            # Raised here rather than after decoding thousands of images.
            part = "test" if len(train) else "train"
            raise UserError(
                f"{where} leaves client {name(site)} no {part} example "
                f"with data.split={split}; every client needs at least one"
            )
        train, validation = split_validation(
            train,
            groups[train],
            validation_fraction=validation_fraction,
            max_train=max_train,
            seed=seed,
            client=site,
        )
        clients.append(ClientSplit(name(site), train, validation, test))
    return tuple(clients)
