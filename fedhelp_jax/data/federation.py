"""A federation on the device: one flat pool of examples, and tables of which client owns which."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import FederatedDataset, PublicDataset

ROLES = ("small", "large")
SPLITS = ("train", "validation", "test")


class Pool(NamedTuple):
    """All private examples, each stored once: ``[N, *spatial, C]`` images, ``[N, ...]`` targets."""

    images: jax.Array
    targets: jax.Array


class PublicPool(NamedTuple):
    """The public examples.

    Attributes:
      images: ``[P, *spatial, C]``.
      labels: ``[P, ...]``, or None.
      answers: ``[P, ...]`` the foundation model's logits, or None.
    """

    images: jax.Array
    labels: jax.Array | None
    answers: jax.Array | None


class ClientIndex(NamedTuple):
    """Which client owns which examples.

    Attributes:
      index: int32 ``[K, n_max]`` positions in the pool; the first ``size[i]`` of row i are valid.
      size: int32 ``[K]`` number of examples of each client.
    """

    index: jax.Array
    size: jax.Array


class ClientData(NamedTuple):
    """What one client has access to in a round: its `ClientIndex` row, the pool and public set."""

    pool: Pool
    public: PublicPool | None
    index: jax.Array
    size: jax.Array


class Group(NamedTuple):
    """The clients of one role, which share an architecture.

    Attributes:
      role: One of `ROLES`.
      names: Name of each client.
      ids: int32 ``[K]`` position of each client in the data set.
      train: Training examples.
      validation: Validation examples.
      test: Test examples.
    """

    role: str
    names: tuple[str, ...]
    ids: jax.Array
    train: ClientIndex
    validation: ClientIndex
    test: ClientIndex


class Federation(NamedTuple):
    """Everything a simulation trains and evaluates on.

    Attributes:
      pool: All private examples.
      public: The public set, or None.
      groups: The clients of one or two roles.
      pooled: The training examples of all clients as those of one client: ``index`` int32 ``[n]``,
        ``size``.
    """

    pool: Pool
    public: PublicPool | None
    groups: tuple[Group, ...]
    pooled: ClientIndex


def assign_roles(
    dataset: FederatedDataset, *, top_n: int, large: Sequence[str] = ()
) -> tuple[str, ...]:
    """Returns the role of each client.

    The clients named in ``large`` are large. If none is named, those with the ``top_n`` largest
    training sets are. Ties are broken by the order in the data set.

    Args:
      dataset: The private data.
      top_n: Number of large clients, ``0 <= top_n <= K``; unused if ``large`` is given.
      large: Names of the large clients.

    Returns:
      "small" or "large" per client.

    Raises:
      UserError: If ``top_n`` is out of range or a name is unknown.
    """
    names = [client.name for client in dataset.clients]
    if large:
        unknown = [name for name in large if name not in names]
        if unknown:
            raise UserError(f"roles.large: no client {unknown[0]!r}; there are {', '.join(names)}")
        return tuple("large" if name in large else "small" for name in names)
    if top_n > len(names):
        raise UserError(f"roles.top_n: {top_n} is more than the {len(names)} clients there are")
    by_size = sorted(range(len(names)), key=lambda i: -len(dataset.clients[i].train))
    largest = set(by_size[:top_n])
    return tuple("large" if i in largest else "small" for i in range(len(names)))


def make_federation(
    dataset: FederatedDataset,
    roles: Sequence[str],
    public: PublicDataset | None = None,
    answers: np.ndarray | None = None,
    *,
    on_host: bool = False,
) -> Federation:
    """Puts the data on the device.

    Args:
      dataset: The private data.
      roles: "small" or "large" per client.
      public: The public data, or None.
      answers: float ``[P, ..., F]`` the foundation model's logits in the order of ``public``, or
        None.
      on_host: Whether to leave the data on the host, as NumPy arrays.

    Returns:
      The federation. A role without clients has no group.
    """
    put: Any = np.asarray if on_host else jnp.asarray
    groups = []
    for role in ROLES:
        ids = [i for i, r in enumerate(roles) if r == role]
        if not ids:
            continue
        clients = [dataset.clients[i] for i in ids]
        # All splits have the same width, so that evaluating another split does not recompile.
        width = max(len(getattr(client, split)) for client in clients for split in SPLITS)
        tables = [
            ClientIndex(*map(put, _table([getattr(client, split) for client in clients], width)))
            for split in SPLITS
        ]
        names = tuple(client.name for client in clients)
        groups.append(Group(role, names, put(ids, np.int32), *tables))
    public_pool = None
    if public is not None:
        public_pool = PublicPool(
            images=put(public.images),
            labels=None if public.labels is None else put(public.labels),
            answers=None if answers is None else put(answers),
        )
    pool = Pool(put(dataset.images), put(dataset.labels))
    # Sorted, so that the order of the clients does not matter.
    union = np.sort(np.concatenate([client.train for client in dataset.clients]))
    pooled = ClientIndex(put(union, np.int32), put(len(union), np.int32))
    return Federation(pool, public_pool, tuple(groups), pooled)


def normalize_images(images: jax.Array) -> jax.Array:
    """Returns uint8 pixels 0..255 scaled to floats in [-1, 1]; float values are not scaled."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(float)
    return images.astype(float) / 127.5 - 1.0


def _table(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        index[i, : len(row)] = row
    return index, np.asarray([len(row) for row in rows], np.int32)
