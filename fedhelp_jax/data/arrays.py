"""Private and public data from the user's own arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.partition.clients import SITE, Column, Examples, Splitting, make_clients
from fedhelp_jax.data.partition.sharing import Sharing
from fedhelp_jax.data.types import (
    ClientSplit,
    FederatedDataset,
    PublicDataset,
    check_federated,
    check_public,
    image_sha256,
    of_federated,
    of_public,
)

_SPLITS = ("train", "validation", "test")


def from_arrays(
    images: Any,
    labels: Any,
    *,
    clients: Any = None,
    split: Any = None,
    groups: Any = None,
    partition: Sharing | None = None,
    label_names: Sequence[str] | None = None,
    name: str = "arrays",
    validation_fraction: float = 0.1,
    test_fraction: float = 0.25,
    max_train: int | None = None,
    seed: int = 0,
) -> FederatedDataset:
    """Returns private data made from arrays.

    Args:
      images: ``[N, H, W]`` or ``[N, H, W, C]``, for volumes ``[N, D, H, W, C]``: uint8 pixels, or
        floats, which are passed to the networks unchanged. Grey images are repeated over three
        channels.
      labels: ``[N]`` integer classes, or masks ``[N, *mask]`` with the class of each pixel.
      clients: ``[N]`` the name of the client that each example belongs to. If None, examples are
        assigned to clients by ``partition``.
      split: ``[N]`` "train", "validation" or "test". If None, ``test_fraction`` of each client's
        examples is drawn for testing. If no example is for validation, ``validation_fraction`` of
        the training examples is drawn for it.
      groups: ``[N]`` the patient or lesion of each example. Random splits keep a group on one side.
        If None, each example is its own group.
      partition: How examples are assigned if ``clients`` is None; by default evenly to six clients.
      label_names: Names of the classes; numbers if None. For masks, a single name is that of the
        foreground; of several names, the first is the background.
      name: Name of the data in tables.
      validation_fraction: See ``split``.
      test_fraction: See ``split``.
      max_train: Maximum number of training examples per client.
      seed: Seed of all random draws.

    Raises:
      UserError: If the arrays do not match, or a client has no training or test example.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> images = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
      >>> data = from_arrays(images, rng.integers(0, 4, 60), clients=["a", "b", "c"] * 20)
      >>> [client.name for client in data.clients], data.num_classes
      (['a', 'b', 'c'], 4)
    """
    images, labels = _images(images, "images"), np.asarray(labels)
    count = len(images)
    given = {"labels": labels, "clients": clients, "split": split, "groups": groups}
    for key, values in given.items():
        if values is not None and len(values) != count:
            raise UserError(f"{key} has {len(values)} entries, but there are {count} images")
    if labels.dtype.kind not in "iub":
        raise UserError(f"labels must be integers, got {labels.dtype}")
    labels = labels.astype(np.uint8 if labels.ndim > 1 else np.int32)
    sides = None if split is None else np.asarray(split).astype(str)
    if sides is not None and (wrong := sorted(set(sides.tolist()) - set(_SPLITS))):
        raise UserError(f"split has {wrong[0]!r}; it must hold {', '.join(_SPLITS)}")
    _, group = np.unique(np.arange(count) if groups is None else groups, return_inverse=True)
    columns: dict[str, Column] = {}
    if clients is not None:
        names, codes = np.unique(np.asarray(clients).astype(str), return_inverse=True)
        columns[SITE] = Column(codes, names.tolist())
    elif sides is not None and (sides == "validation").any():
        raise UserError("split has validation examples: give clients too, to say whose they are")
    if clients is not None and sides is not None and (sides == "validation").any():
        splits = _as_given(columns[SITE], sides)
    else:
        examples = Examples(
            images,
            labels if labels.ndim == 1 else None,
            group,
            None if sides is None else sides == "test",
            columns,
            [str(i) for i in range(count)],
        )
        rule = Splitting("official", validation_fraction, test_fraction, max_train, seed)
        sharing = partition or Sharing(by="iid" if clients is None else None)
        splits = make_clients(examples, sharing, rule, name=name, where=f"data {name}")
    names = _label_names(labels, label_names)
    dataset = FederatedDataset(name, False, images, labels, names, splits)
    return check_federated(dataset._replace(content_sha256=of_federated(dataset)))


def public_from_arrays(
    images: Any,
    labels: Any = None,
    *,
    label_names: Sequence[str] | None = None,
    name: str = "public arrays",
) -> PublicDataset:
    """Returns public data made from arrays.

    Args:
      images: As in `from_arrays`, with the same size as the private images.
      labels: ``[P]`` integer classes or masks, or None. The classes may differ from the private
        ones.
      label_names: Names of the classes; numbers if None.
      name: Name of the data in tables.

    Raises:
      UserError: If the arrays do not match.
    """
    originals = np.asarray(images)
    shown = _images(images, "images")
    hashed = originals if originals.dtype == np.uint8 else originals.astype(np.float32)
    names = None
    if labels is not None:
        labels = np.asarray(labels)
        if len(labels) != len(shown):
            raise UserError(f"labels has {len(labels)} entries, but there are {len(shown)} images")
        labels = labels.astype(np.uint8 if labels.ndim > 1 else np.int32)
        names = _label_names(labels, label_names)
    public = PublicDataset(
        name, False, shown, labels, names, tuple(map(image_sha256, hashed)), hashed
    )
    return check_public(public._replace(content_sha256=of_public(public)))


def _images(images: Any, key: str) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8:
        if images.dtype.kind != "f":
            raise UserError(f"{key} must be uint8 pixels or floats, got {images.dtype}")
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise UserError(f"{key} must be finite")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim not in (4, 5) or not len(images):
        raise UserError(f"{key} must be [N, H, W, C] or [N, D, H, W, C], got {images.shape}")
    if images.ndim == 4 and images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    return np.ascontiguousarray(images)


def _label_names(labels: np.ndarray, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is not None:
        return tuple(names)
    classes = int(labels.max()) + 1
    if labels.ndim > 1 and classes <= 2:
        return ("foreground",)
    return tuple(map(str, range(classes)))


def _as_given(clients: Column, sides: np.ndarray) -> tuple[ClientSplit, ...]:
    def members(code: int, side: str) -> np.ndarray:
        return np.flatnonzero((clients.codes == code) & (sides == side)).astype(np.int32)

    return tuple(
        ClientSplit(name, *(members(code, side) for side in _SPLITS))
        for code, name in enumerate(clients.names)
    )
