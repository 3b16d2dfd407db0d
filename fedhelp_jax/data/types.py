"""The types that every data source returns, and the checks that their values pass."""

import hashlib
import logging
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError, first_of
from fedhelp_jax.data.bad_examples import BadExample

logger = logging.getLogger(__name__)


class ClientSplit(NamedTuple):
    """One client's examples, as int32 [n] indices into the pool; the three splits are disjoint."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class FederatedDataset(NamedTuple):
    """One pool of private examples and, for each client, the indices of its examples.

    Attributes:
        name: Name of the source.
        synthetic: True if the images were generated rather than photographed.
        images: uint8 [N, H, W, 3], resized; grey images are repeated over the channels. Volumes
            are [N, D, H, W, modalities]. The type is float32 if the source stores floats or if
            harmonisation produced them; such values are passed to the networks unchanged.
        labels: int32 [N] classes; or masks, uint8 ``[N, *mask]``, with the class of each pixel. All
            masks have the same resolution, which may differ from that of the images.
        label_names: Name of each class. For masks, a single name is that of the foreground (the
            masks hold 0 and 1); of several names, the first is the background.
        clients: The clients' splits.
        content_sha256: `content_sha256` of the data as read, before harmonisation.
        left_out: Examples of the source that cannot be used; they appear in none of the above.
        left_out_images: Images of left-out examples that could be decoded, in the format of
            `images`. They are private too. None if there are none.
        facts: Further observations of the reader, as pairs of a name and a text for people.
    """

    name: str
    synthetic: bool
    images: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    clients: tuple[ClientSplit, ...]
    content_sha256: str = ""
    left_out: tuple[BadExample, ...] = ()
    left_out_images: np.ndarray | None = None
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of outputs of a network for these data."""
        return len(self.label_names)


class PublicDataset(NamedTuple):
    """Images available to everyone, with what is needed to match a teacher's answers to them.

    Attributes:
        name: Name of the source.
        synthetic: True if the images were generated rather than photographed.
        images: uint8 [P, H, W, 3], or another form that private images may have.
        labels: int32 [P], or masks, uint8 ``[P, *mask]``, as in the private data; None if the
            images are not labelled.
        label_names: Name of each class, as in the private data, or None without labels.
        sha256: `image_sha256` of each image before resizing and before grey became RGB.
        originals: Those images themselves, each [H, W] or [H, W, channels]; for volumes, [D, H, W]
            or [D, H, W, modalities]. May be lazy.
        content_sha256: As in the private data.
        left_out: As in the private data.
        facts: As in the private data.
    """

    name: str
    synthetic: bool
    images: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...] | None
    sha256: tuple[str, ...]
    originals: Sequence[np.ndarray] | np.ndarray
    content_sha256: str = ""
    left_out: tuple[BadExample, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


def image_sha256(image: np.ndarray) -> str:
    """Returns the hex SHA-256 of an image's shape and pixels.

    Args:
        image: The decoded image at its native size, uint8 or float32, [H, W], [H, W, channels],
            [D, H, W] or [D, H, W, modalities].

    Returns:
        SHA-256 of `repr(shape)`, followed by "float32" if that is the type, and the pixels in C
        order and little-endian.

    Raises:
        TypeError: `image` has another type, whose bytes would give a different hash.

    >>> image_sha256(np.zeros((2, 2), np.uint8))[:8]
    '660c5b93'
    """
    if image.dtype not in (np.uint8, np.float32):
        raise TypeError(f"image_sha256 takes uint8 or float32 pixels, got {image.dtype}")
    what = repr(tuple(int(length) for length in image.shape))
    if image.dtype == np.float32:
        what, image = f"{what}float32", image.astype("<f4", copy=False)
    return hashlib.sha256(what.encode() + image.tobytes(order="C")).hexdigest()


def content_sha256(*parts: np.ndarray | str | None) -> str:
    """Returns the hex SHA-256 of arrays (with their types and shapes) and texts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, np.ndarray):
            digest.update(f"{part!r}\n".encode())
            continue
        digest.update(f"{part.dtype.str}{part.shape}\n".encode())
        # Hashed in blocks, since each block of a non-contiguous array is copied.
        step = max(1, 2**24 // max(1, part[:1].nbytes))
        for start in range(0, len(part), step):
            digest.update(np.ascontiguousarray(part[start : start + step]).data)
    return digest.hexdigest()


def of_federated(dataset: FederatedDataset) -> str:
    """Returns the `content_sha256` of the examples and of the clients' splits."""
    splits = [
        part
        for client in dataset.clients
        for part in (client.name, client.train, client.validation, client.test)
    ]
    count = str(len(dataset.label_names))
    return content_sha256(dataset.images, dataset.labels, count, *splits)


def of_public(public: PublicDataset) -> str:
    """Returns the `content_sha256` of public examples, by which a teacher identifies them too."""
    return content_sha256(
        public.images, public.labels, repr(public.label_names), "\n".join(public.sha256)
    )


def check_federated(dataset: FederatedDataset) -> FederatedDataset:
    """Returns `dataset` unchanged after checking that it is usable.

    Logs a warning for classes of which no client has an example, and for images whose pixels
    occur in two different splits.

    Raises:
        UserError: A client has no training or no test example, or shares an example between
            its own splits or with another client, or a label has no label name.
    """
    if not dataset.clients:
        raise UserError(f"data {dataset.name}: no client has any images")
    num_classes, labels = len(dataset.label_names), dataset.labels
    if labels.ndim > 1:
        num_classes = max(2, num_classes)  # a single name is that of the foreground
    # Check the extremes first: comparing hundreds of megabytes of masks allocates as much again.
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        bad = np.argwhere((labels < 0) | (labels >= num_classes))[0]
        raise UserError(
            f"data {dataset.name}: label {labels[tuple(bad)]} of example {bad[0]} "
            f"is not in 0..{num_classes - 1}"
        )
    owner = np.full(len(labels), -1)
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
    if labels.ndim == 1:
        used = labels[owner >= 0]
        _tell_of_unseen(used, dataset.label_names, f"data {dataset.name}: no client has an example")
    _tell_of_copies(dataset)
    return dataset


def check_public(public: PublicDataset) -> PublicDataset:
    """Returns `public` unchanged after logging a warning for classes that have no image.

    Masks and synthetic data are not checked.
    """
    labels, names = public.labels, public.label_names
    if labels is not None and names is not None and labels.ndim == 1 and not public.synthetic:
        _tell_of_unseen(labels, names, f"public {public.name}: there is no image")
    return public


def _tell_of_unseen(labels: np.ndarray, names: Sequence[str], start: str) -> None:
    unseen = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(unseen):
        logger.warning("%s of %s", start, first_of([names[int(c)] for c in unseen]))


def _tell_of_copies(dataset: FederatedDataset) -> None:
    """Warns of examples that have the same pixels as one in another split, of any client."""
    seen: dict[int, list[int]] = {}  # examples by the checksum of their pixels
    for split, others in (("train", ""), ("validation", "train"), ("test", "train or validation")):
        members = np.sort(np.concatenate([getattr(client, split) for client in dataset.clients]))
        images = {i: np.ascontiguousarray(dataset.images[i]) for i in members.tolist()}
        sums = {i: zlib.crc32(image.data) for i, image in images.items()}
        # Different pixels may have the same checksum, so matches are confirmed by the pixels.
        copies = [
            i
            for i, image in images.items()
            if any(np.array_equal(image, dataset.images[j]) for j in seen.get(sums[i], ()))
        ]
        if copies:
            logger.warning(
                "data %s: %d of %d %s examples have the pixels of another in %s; the first is "
                "example %d",
                *(dataset.name, len(copies), len(members), split, others, copies[0]),
            )
        for i in members.tolist():
            seen.setdefault(sums[i], []).append(i)
