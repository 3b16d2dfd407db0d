"""What every data source returns, and the checks that all of it passes."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedhelp_jax.errors import UserError


class ClientSplit(NamedTuple):
    """One client's examples: int32 [n] indices into the pool, disjoint between the three."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class FederatedDataset(NamedTuple):
    """One pool of private examples and, per client, the indices that belong to it.

    Attributes:
        name: Name of the source.
        synthetic: True where the images were generated rather than photographed.
        images: uint8 [N, H, W, 3]; grey images are repeated over the channels.
        labels: int32 [N].
        label_names: Name of each class.
        clients: The clients' splits.
    """

    name: str
    synthetic: bool
    images: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    clients: tuple[ClientSplit, ...]


class PublicDataset(NamedTuple):
    """Images known to everyone, with what is needed to join a teacher's answers to them.

    Attributes:
        name: Name of the source.
        synthetic: True where the images were generated rather than photographed.
        images: uint8 [P, H, W, 3], resized; grey images are repeated over the channels.
        labels: int32 [P], or None where nobody labelled them.
        label_names: Name of each class, or None without labels.
        sha256: `image_sha256` of each image before resizing and before grey became RGB.
        originals: Those images themselves, uint8 [H, W] or [H, W, channels] each; may be lazy.
    """

    name: str
    synthetic: bool
    images: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...] | None
    sha256: tuple[str, ...]
    originals: Sequence[np.ndarray] | np.ndarray


def image_sha256(image: np.ndarray) -> str:
    """Returns the hex SHA-256 of an image's shape and pixels.

    Args:
        image: uint8 array of the decoded image at its native size, [H, W] or [H, W, channels].

    Returns:
        SHA-256 of `repr(shape)` followed by the pixels in C order.

    Raises:
        TypeError: `image` is not uint8: other types would hash other bytes.

    >>> image_sha256(np.zeros((2, 2), np.uint8))[:8]
    '660c5b93'
    """
    if image.dtype != np.uint8:
        raise TypeError(f"image_sha256 takes uint8 pixels, got {image.dtype}")
    shape = repr(tuple(int(length) for length in image.shape)).encode()
    return hashlib.sha256(shape + image.tobytes(order="C")).hexdigest()


def check_federated(dataset: FederatedDataset) -> FederatedDataset:
    """Returns `dataset` unchanged, once it is known to be usable.

    Raises:
        UserError: A client has no training or no test example, or shares an example between
            its own splits or with another client, or a label is outside the label names.
    """
    if not dataset.clients:
        raise UserError(f"data {dataset.name}: no client has any images")
    num_classes = len(dataset.label_names)
    bad = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= num_classes))
    if bad.size:
        raise UserError(
            f"data {dataset.name}: label {dataset.labels[bad[0]]} of example {bad[0]} "
            f"is not in 0..{num_classes - 1}"
        )
    owner = np.full(len(dataset.labels), -1)
    for number, client in enumerate(dataset.clients):
        for part, members in (("train", client.train), ("test", client.test)):
            if not len(members):
                raise UserError(
                    f"data {dataset.name}: client {client.name} has no {part} example; "
                    f"every client needs at least one"
                )
        indices = np.concatenate([client.train, client.validation, client.test])
        if indices.min() < 0 or indices.max() >= len(owner):
            raise UserError(
                f"data {dataset.name}: client {client.name} has an index outside the pool"
            )
        if len(np.unique(indices)) != len(indices) or np.any(owner[indices] >= 0):
            raise UserError(
                f"data {dataset.name}: client {client.name} holds an example twice, "
                f"or one of another client"
            )
        owner[indices] = number
    return dataset
