"""How examples that come from no known hospitals are shared out among clients.

Alike (``fractions``), or unlike each other as papers make them: in classes (``dirichlet``,
``shards``) or in size (``quantity``). Peers draw until every client has enough, which for a small
alpha is for ever; here the tries are counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedhelp_jax.data.partition import partition, split_sizes
from fedhelp_jax.errors import UserError

SKEWED = ("dirichlet", "quantity", "shards")
KINDS = ("fractions", *SKEWED)
_TRIES = 100


class Sharing(NamedTuple):
    """What decides which client has which examples.

    Attributes:
        by: One of `KINDS`.
        fractions: With "fractions", each client's share; positive, with sum 1.
        num_clients: Otherwise, how many clients there are.
        alpha: With "dirichlet" and "quantity", the concentration: the smaller, the more unlike.
        min_examples: The least a client has, validation examples too.
        shards: With "shards", how many a client has: about as many classes.
    """

    by: str = "fractions"
    fractions: tuple[float, ...] = ()
    num_clients: int = 6
    alpha: float = 0.5
    min_examples: int = 1
    shards: int = 2


def share_out(labels: np.ndarray, sharing: Sharing, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns each client's examples, sorted int32 indices, together all of them.

    - "fractions": at random, in the given sizes.
    - "quantity": at random, in sizes ``p n`` with ``p ~ Dirichlet(alpha 1_K)``.
    - "dirichlet": of each class ``c`` client ``k`` gets the part ``p_ck``, with
      ``p_c ~ Dirichlet(alpha 1_K)``, drawn until every client has enough, 100 times at most.
    - "shards": sorted by class and cut into ``K shards`` equal pieces, dealt out at random.

    Args:
        labels: int [n] classes.
        sharing: How.
        rng: Source of all draws.

    Raises:
        UserError: If there are too few examples, or no draw gives every client enough.

    References:
        McMahan et al., AISTATS 2017, arXiv:1602.05629 (shards); Yurochkin et al., ICML 2019,
        arXiv:1905.12022 (a Dirichlet a class); Li et al., ICDE 2022, arXiv:2102.02079 (quantity).
    """
    total, clients, least = len(labels), sharing.num_clients, sharing.min_examples
    if sharing.by == "fractions":
        return partition(total, sharing.fractions, rng, least)
    if total < clients * least:
        raise UserError(
            f"data.num_clients: {total} examples are too few for {clients} clients of at least "
            f"{least}"
        )
    if sharing.by == "quantity":
        # A draw may round to 0, which is no share.
        shares = np.maximum(_dirichlet(sharing.alpha, clients, rng), 1e-9)
        sizes = split_sizes(total, (shares / shares.sum()).tolist(), least)
        return _cut(rng.permutation(total), np.cumsum(sizes)[:-1])
    if sharing.by == "shards":
        # A random order of equals, then one that keeps it.
        order = rng.permutation(total)
        order = order[np.argsort(labels[order], kind="stable")]
        pieces = np.array_split(order, clients * sharing.shards)
        dealt = rng.permutation(len(pieces)).reshape(clients, sharing.shards)
        found = [_sorted(np.concatenate([pieces[i] for i in own])) for own in dealt]
        if min(map(len, found)) < least:
            raise UserError(
                f"data.shards: {clients} clients of {sharing.shards} pieces leave one with fewer "
                f"than {least} of {total} examples"
            )
        return found
    if sharing.by != "dirichlet":
        raise UserError(f"data.split_by must be one of {', '.join(KINDS)}, got {sharing.by!r}")
    for _ in range(_TRIES):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = np.cumsum(_dirichlet(sharing.alpha, clients, rng))[:-1]
            cuts = np.split(members, np.rint(shares * len(members)).astype(int))
            for own, cut in zip(parts, cuts, strict=True):
                own.append(cut)
        found = [_sorted(np.concatenate(own)) for own in parts]
        if min(map(len, found)) >= least:
            return found
    raise UserError(
        f"data.alpha = {sharing.alpha:g}: in {_TRIES} draws some of {clients} clients always had "
        f"fewer than data.min_examples = {least} of {total} examples; a larger alpha, fewer "
        "clients or a smaller minimum would do"
    )


def share_out_alike(
    like: Sequence[np.ndarray], labels: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Returns each client's part of other examples, in which its classes are as in its own.

    Of each class a client gets as many as its part of that class is there; of a class that nobody
    has, all the same. Everyone gets one at least.

    Args:
        like: The classes of each client's own examples.
        labels: int [n] classes of the others, at least one a client.
        rng: Decides which.

    Returns:
        Sorted int32 indices, together all of them.

    Raises:
        UserError: If there are fewer examples than clients.
    """
    if len(labels) < len(like):
        raise UserError(
            f"data.num_clients: {len(labels)} test examples are too few for {len(like)} clients"
        )
    parts: list[list[int]] = [[] for _ in like]
    for label in np.unique(labels):
        counts = np.array([np.count_nonzero(own == label) for own in like], float)
        counts = counts if counts.any() else np.ones(len(like))
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(counts / counts.sum())[:-1] * len(members)).astype(int)
        for own, cut in zip(parts, np.split(members, cuts), strict=True):
            own.extend(cut.tolist())
    for own in parts:
        if not own:
            own.append(max(parts, key=len).pop())
    return [_sorted(np.array(own)) for own in parts]


def _dirichlet(alpha: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """A draw of ``Dirichlet(alpha 1)``; of so small an alpha that all round to 0, a corner."""
    shares = rng.dirichlet(np.full(count, alpha))
    return shares if shares.sum() > 0.5 else np.eye(count)[rng.integers(count)]


def _cut(order: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    return [_sorted(part) for part in np.split(order, places)]


def _sorted(indices: np.ndarray) -> np.ndarray:
    return np.sort(indices).astype(np.int32)
