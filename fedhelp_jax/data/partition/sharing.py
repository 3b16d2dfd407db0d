"""Assigns examples without known hospitals to clients.

Clients are alike (``fractions``, ``iid``) or heterogeneous in the ways that papers simulate: in
classes (``dirichlet``, ``shards``), in size (``quantity``) or in appearance (``clusters``). Groups,
such as a patient's images, stay together. Other libraries redraw until every client has enough
examples, which may never end for a small alpha; here the number of draws is limited.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.partition.fractions import split_sizes
from fedhelp_jax.settings.schema import SHARINGS

ALIKE = ("fractions", "iid")
BY_CLASS = ("dirichlet", "shards")
_TRIES = 100
_CLUSTER_TRIES = 20
_CLUSTER_STEPS = 50  # of Lloyd's algorithm
_GRID = 8  # cells along each side of the thumbnails that are clustered
_BLOCK_BYTES = 2**26


class Sharing(NamedTuple):
    """How examples are assigned to clients.

    Attributes:
        by: One of `SHARINGS`, "site", or "column:NAME"; None means "site" if sites are known,
            otherwise "fractions".
        fractions: With "fractions", each client's share; positive, with sum 1.
        num_clients: Otherwise, the number of clients.
        dirichlet_alpha: With "dirichlet" and "quantity", the concentration; the smaller it is, the
            more the clients differ.
        min_examples: Minimum number of training and validation examples per client.
        shards_per_client: With "shards", the number of shards per client, which is about the number
            of classes that it has.
    """

    by: str | None = "fractions"
    fractions: tuple[float, ...] = ()
    num_clients: int = 6
    dirichlet_alpha: float = 0.5
    min_examples: int = 1
    shards_per_client: int = 2


class Units(NamedTuple):
    """The units that are assigned to clients as a whole: groups of examples.

    Attributes:
        of: int [n] unit of each example, numbered in order of first appearance.
        sizes: int [u] number of examples of each unit.
        labels: int [u] most frequent class of each unit; ties go to the lowest class.
    """

    of: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def units_of(groups: np.ndarray, labels: np.ndarray) -> Units:
    """Returns the groups of examples as units.

    Args:
        groups: [n] group of each example.
        labels: int [n] class of each example.

    >>> units_of(np.array(["b", "a", "b"]), np.array([1, 0, 1]))
    Units(of=array([0, 1, 0]), sizes=array([2, 1]), labels=array([1, 0]))
    """
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    place = np.empty(len(first), int)
    place[np.argsort(first)] = np.arange(len(first))
    of = place[inverse]
    sizes = np.bincount(of)
    if len(sizes) == len(of):
        return Units(of, sizes, labels)
    # Sorted by unit, then by frequency with the most frequent class first.
    pairs, counts = np.unique(np.stack([of, labels]), axis=1, return_counts=True)
    order = np.lexsort((-counts, pairs[0]))
    _, starts = np.unique(pairs[0][order], return_index=True)
    return Units(of, sizes, pairs[1][order][starts])


def share_out(
    labels: np.ndarray,
    sharing: Sharing,
    rng: np.random.Generator,
    groups: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Assigns every example to a client and returns each client's sorted int32 indices.

    - "fractions": at random, in the given sizes; "iid": at random, in equal sizes.
    - "quantity": at random, in sizes ``p n`` with ``p ~ Dirichlet(alpha 1_K)``.
    - "dirichlet": client ``k`` gets the share ``p_ck`` of each class ``c``, with
      ``p_c ~ Dirichlet(alpha 1_K)``. The draw is repeated until every client has enough examples,
      at most 100 times.
    - "shards": examples are sorted by class and cut into ``K shards`` equal pieces, which are
      assigned at random.

    Groups are never cut, so the sizes are only as close as whole groups allow.

    Args:
        labels: int [n] classes.
        sharing: How to assign them; for "clusters", use `share_out_by_looks`.
        rng: Source of all draws.
        groups: [n] group of each example; if None, each example is its own group.

    Raises:
        UserError: If there are too few examples, or no draw gives every client enough.

    References:
        McMahan et al., AISTATS 2017, arXiv:1602.05629 (shards); Yurochkin et al., ICML 2019,
        arXiv:1905.12022 (one Dirichlet draw per class); Li et al., ICDE 2022, arXiv:2102.02079
        (quantity).
    """
    total, clients, least = len(labels), sharing.num_clients, sharing.min_examples
    units = units_of(np.arange(total) if groups is None else groups, labels)
    if sharing.by == "fractions":
        clients, sizes = len(sharing.fractions), split_sizes(total, sharing.fractions, least)
        dealt = _cut(rng.permutation(len(units.sizes)), units.sizes, np.cumsum(sizes)[:-1])
        return _checked(dealt, units, least, "data.fractions")
    if total < clients * least:
        raise UserError(
            f"data.num_clients: {total} examples are too few for {clients} clients of at least "
            f"{least}"
        )
    match sharing.by:
        case "iid" | "quantity":
            shares = np.full(clients, 1.0)
            if sharing.by == "quantity":
                # A draw may round to 0, which is not a valid share.
                shares = np.maximum(_dirichlet(sharing.dirichlet_alpha, clients, rng), 1e-9)
            sizes = split_sizes(total, (shares / shares.sum()).tolist(), least)
            dealt = _cut(rng.permutation(len(units.sizes)), units.sizes, np.cumsum(sizes)[:-1])
            return _checked(dealt, units, least, "data.num_clients")
        case "shards":
            if total < clients * sharing.shards_per_client:
                raise UserError(
                    f"data.shards_per_client = {sharing.shards_per_client}: {total} examples are "
                    f"too few for {clients} clients of so many pieces each"
                )
            # Shuffle, then sort stably, so that units of the same class are in random order.
            order = rng.permutation(len(units.sizes))
            order = order[np.argsort(units.labels[order], kind="stable")]
            count = clients * sharing.shards_per_client
            ends = np.cumsum([len(piece) for piece in np.array_split(np.arange(total), count)])
            pieces = _cut(order, units.sizes, ends[:-1])
            places = rng.permutation(count).reshape(clients, sharing.shards_per_client)
            dealt = [np.concatenate([pieces[i] for i in own]) for own in places]
            return _checked(
                dealt,
                units,
                least,
                f"data.shards_per_client: pieces of {sharing.shards_per_client} a client",
            )
        case "dirichlet":
            return _by_dirichlet(units, sharing, rng)
    raise UserError(f"data.split_by must be one of {', '.join(SHARINGS)}, got {sharing.by!r}")


def _by_dirichlet(units: Units, sharing: Sharing, rng: np.random.Generator) -> list[np.ndarray]:
    clients, least = sharing.num_clients, sharing.min_examples
    for _ in range(_TRIES):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(units.labels):
            members = rng.permutation(np.flatnonzero(units.labels == label))
            shares = np.cumsum(_dirichlet(sharing.dirichlet_alpha, clients, rng))[:-1]
            places = np.rint(shares * units.sizes[members].sum()).astype(int)
            for own, cut in zip(parts, _cut(members, units.sizes, places), strict=True):
                own.append(cut)
        dealt = [np.concatenate(own) for own in parts]
        if min(units.sizes[own].sum() for own in dealt) >= least:
            return _examples(dealt, units)
    raise UserError(
        f"data.dirichlet_alpha = {sharing.dirichlet_alpha:g}: in {_TRIES} draws some of {clients} "
        f"clients always had fewer than data.min_examples = {least} of {units.sizes.sum()} "
        "examples; a larger alpha, fewer clients or a smaller minimum would do"
    )


def partition_like(
    like: Sequence[np.ndarray],
    labels: np.ndarray,
    rng: np.random.Generator,
    groups: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Assigns further examples so that each client's class proportions match those of its own.

    A client gets the same share of each class as it has of that class in `like`. A class that no
    client has is divided equally. Every client gets at least one example. Groups are never cut.

    Args:
        like: The classes of each client's own examples.
        labels: int [n] classes of the further examples, at least one per client.
        rng: Source of all draws.
        groups: [n] group of each further example; if None, each example is its own group.

    Returns:
        Each client's sorted int32 indices, which together cover all examples.

    Raises:
        UserError: If there are fewer examples, or groups, than clients.
    """
    units = units_of(np.arange(len(labels)) if groups is None else groups, labels)
    if len(units.sizes) < len(like):
        raise UserError(
            f"data.num_clients: {len(units.sizes)} test examples are too few for {len(like)} "
            "clients"
        )
    parts: list[list[int]] = [[] for _ in like]
    for label in np.unique(units.labels):
        counts = np.array([np.count_nonzero(own == label) for own in like], float)
        counts = counts if counts.any() else np.ones(len(like))
        members = rng.permutation(np.flatnonzero(units.labels == label))
        total = units.sizes[members].sum()
        places = np.rint(np.cumsum(counts / counts.sum())[:-1] * total).astype(int)
        for own, cut in zip(parts, _cut(members, units.sizes, places), strict=True):
            own.extend(cut.tolist())
    for own in parts:
        if not own:
            own.append(max(parts, key=len).pop())
    return _examples([np.array(own) for own in parts], units)


def share_out_by_looks(
    images: np.ndarray,
    is_test: np.ndarray,
    sharing: Sharing,
    rng: np.random.Generator,
    groups: np.ndarray,
) -> np.ndarray:
    """Returns the client of each example, int [n]; clients are clusters of similar images.

    Runs k-means on thumbnails with 8 cells per side (see `thumbnail_features`), after standardising
    each feature. Groups are clustered by their means. Test examples go to the client with the
    nearest centre. Clients are numbered by size, largest first.

    Args:
        images: [n, *spatial, C].
        is_test: bool [n]; the centres are computed from the other examples.
        sharing: `num_clients` and `min_examples` are used.
        rng: Draws the initial centres, at most 20 times.
        groups: [n] group of each example.

    Raises:
        UserError: If no draw gives every client enough training examples, and a test example if
            there are any.
    """
    # Imported here, since few runs need it.
    from scipy.cluster.vq import ClusterError, kmeans2, vq

    clients, least = sharing.num_clients, sharing.min_examples
    seen = thumbnail_features(images)
    mean, deviation = seen[~is_test].mean(0), seen[~is_test].std(0)
    seen = (seen - mean) / np.where(deviation > 0, deviation, 1)
    units = units_of(groups, np.zeros(len(groups), int))
    centred = np.zeros((len(units.sizes), seen.shape[1]))
    np.add.at(centred, units.of, seen)
    centred /= units.sizes[:, None]
    trained = np.zeros(len(units.sizes), bool)
    trained[units.of[~is_test]] = True
    for _ in range(_CLUSTER_TRIES if trained.sum() >= clients else 0):
        first = rng.choice(np.flatnonzero(trained), clients, replace=False)
        try:
            centres, _ = kmeans2(
                centred[trained], centred[first], _CLUSTER_STEPS, minit="matrix", missing="raise"
            )
        except ClusterError:
            continue  # a cluster became empty
        owner = vq(centred, centres)[0][units.of]
        counts = np.bincount(owner[~is_test], minlength=clients)
        tests = np.bincount(owner[is_test], minlength=clients)
        if counts.min() >= least and (tests.min() > 0 or not is_test.any()):
            place = np.empty(clients, int)
            place[np.argsort(-counts, kind="stable")] = np.arange(clients)
            return place[owner]
    raise UserError(
        f"data.num_clients: in {_CLUSTER_TRIES} draws some of {clients} clusters always had fewer "
        f"than data.min_examples = {least} training examples, or no test example; fewer clients "
        "or a smaller minimum would do"
    )


def thumbnail_features(images: np.ndarray) -> np.ndarray:
    """Returns the cell means of each image, float64 [n, cells].

    Each axis is cut into 8 nearly equal parts, or fewer if it is shorter; channels are kept.

    Args:
        images: [n, *spatial, C].
    """
    block = max(1, _BLOCK_BYTES // (8 * max(1, images[0].size))) if len(images) else 1
    found = []
    for start in range(0, len(images), block):
        cells = images[start : start + block].astype(np.float64)
        for axis in range(1, images.ndim - 1):
            length = cells.shape[axis]
            starts = np.arange(min(_GRID, length)) * length // min(_GRID, length)
            widths = np.diff([*starts, length])
            sums = np.add.reduceat(cells, starts, axis)
            cells = sums / widths.reshape(-1, *[1] * (cells.ndim - axis - 1))
        found.append(cells.reshape(len(cells), -1))
    return np.concatenate(found)


def _dirichlet(alpha: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a draw of ``Dirichlet(alpha 1)``; a random vertex if all shares underflow to 0."""
    shares = rng.dirichlet(np.full(count, alpha))
    return shares if shares.sum() > 0.5 else np.eye(count)[rng.integers(count)]


def _cut(order: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """Cuts ordered units at the given numbers of examples, as nearly as whole units allow."""
    ends = np.concatenate([[0], np.cumsum(sizes[order])])
    before = np.searchsorted(ends, places, side="right") - 1
    after = np.minimum(before + 1, len(order))
    return np.split(order, np.where(ends[after] - places < places - ends[before], after, before))


def _examples(dealt: Sequence[np.ndarray], units: Units) -> list[np.ndarray]:
    owner = np.empty(len(units.sizes), int)
    for client, own in enumerate(dealt):
        owner[own] = client
    whose = owner[units.of]
    return [np.flatnonzero(whose == client).astype(np.int32) for client in range(len(dealt))]


def _checked(dealt: Sequence[np.ndarray], units: Units, least: int, where: str) -> list[np.ndarray]:
    if min(units.sizes[own].sum() for own in dealt) < least:
        total, groups = units.sizes.sum(), len(units.sizes)
        said = f"{total} examples" + (f" in {groups} groups" if groups < total else "")
        raise UserError(
            f"{where}: {said} leave one of {len(dealt)} clients with fewer than {least}"
        )
    return _examples(dealt, units)
