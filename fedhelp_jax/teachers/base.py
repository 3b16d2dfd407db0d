"""The interface of foundation models, and the images that they may see.

Everything that is sent to a foundation model elsewhere is a `PublicImages`. Only `clear_public`
makes one, from a data set that is declared public and shares no image with any client. A model that
runs at the hospitals may also see their own images, as `OwnImages`, which no other model takes.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import FederatedDataset, PublicDataset, image_sha256

_CLEARED = object()


class Fingerprint(NamedTuple):
    """Everything that determines a foundation model's answers, known without asking it.

    Attributes:
      name: Name of the model.
      version: Version of the model, such as a hash of its file.
      preprocessing: How an image is preprocessed, and which output is taken.
      label_names: ``[P]`` class names; empty if the model returns embeddings.
    """

    name: str
    version: str
    preprocessing: str
    label_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all four fields; answers are stored under it."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()

    def __str__(self) -> str:
        """Returns the fingerprint without the class names, for tables."""
        return f"{self.name} {self.version} ({self.preprocessing})"


class TransientError(Exception):
    """The model did not answer, but may answer if it is asked again.

    Args:
      message: What happened.
      retry_after: Seconds that the server asks the client to wait, if it said so.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class PublicImages:
    """Public images at their native sizes, none of which any client has.

    Only `clear_public` and `take` make instances, so a client's examples can never be in one.
    """

    __slots__ = ("_originals", "_rows", "_sha256", "_volumes")

    def __init__(
        self,
        originals: Sequence[np.ndarray] | np.ndarray,
        rows: Sequence[int],
        sha256: tuple[str, ...],
        volumes: bool = False,
        token: object = None,
    ):
        if token is not _CLEARED:
            raise TypeError("PublicImages come from clear_public(public, private) alone")
        self._originals = originals
        self._rows = tuple(rows)
        self._sha256 = sha256
        self._volumes = volumes

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._rows)

    def take(self, places: Sequence[int]) -> "PublicImages":
        """Returns the images at ``places``, in that order."""
        rows = [self._rows[place] for place in places]
        sha256 = tuple(self.sha256[place] for place in places)
        return PublicImages(self._originals, rows, sha256, self._volumes, _CLEARED)

    @property
    def sha256(self) -> tuple[str, ...]:
        """The hash of each image: `image_sha256` of its native pixels."""
        return self._sha256

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each image: ``(H, W)``, ``(H, W, channels)``, or ``(D, H, W)``."""
        return [self._originals[row].shape for row in self._rows]

    @property
    def pixels(self) -> np.ndarray:
        """The images as one array; they must all have the same shape.

        Returns:
          uint8 ``[B, H, W, C]``.

        Raises:
          UserError: If an image has changed since it was cleared, or is a volume.
        """
        if self._volumes:
            raise UserError(
                "teacher.name: the public images are volumes, which this kind of teacher does not "
                "take; use self_trained, or stored answers"
            )
        images = [self._originals[row] for row in self._rows]
        for image, sha in zip(images, self.sha256, strict=True):
            if image_sha256(image) != sha:
                raise UserError(
                    f"public: the image with sha256 {sha} has changed since it was read"
                )
        stacked = np.stack(images)
        return stacked if stacked.ndim == 4 else stacked[..., None]


class OwnImages:
    """Private images, for a model that runs where they are.

    A model that sends its images anywhere refuses them, since they are no `PublicImages`.
    """

    def __init__(self, images: np.ndarray, sha256: tuple[str, ...]):
        """Holds uint8 images ``[N, H, W, C]`` and their `image_sha256`."""
        self.pixels, self.sha256 = images, sha256

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.sha256)

    def take(self, places: Sequence[int]) -> "OwnImages":
        """Returns the images at ``places``, in that order."""
        rows = list(places)
        return OwnImages(self.pixels[rows], tuple(self.sha256[row] for row in rows))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each image, ``(H, W, C)``."""
        return [image.shape for image in self.pixels]


Images = PublicImages | OwnImages


class FoundationModel(Protocol):
    """A model that answers about images.

    Constructing one needs neither the network nor a heavy library.

    Attributes:
      fingerprint: What determines its answers.
      batch_limit: The most images that it takes at once; None for no limit.
    """

    fingerprint: Fingerprint
    batch_limit: int | None

    def open(self) -> None:
        """Prepares the model without sending anything, such as by reading its file or the API key.

        Raises:
          UserError: If the file or the key cannot be read.
        """
        ...

    def answer(self, images: Images) -> np.ndarray:
        """Returns float32 ``[B, P]`` logits or embeddings, or ``[B, *spatial, P]`` for masks.

        Raises:
          TransientError: If asking again may help.
          UserError: If asking again will not help.
          TypeError: If it does not run here and is given `OwnImages`.
        """
        ...

    def request_bytes(self, images: Images) -> int:
        """Returns how many bytes must be sent from this machine to get answers about ``images``."""
        ...

    def close(self) -> None:
        """Closes connections and files."""
        ...


def check_public(images: object) -> None:
    """Checks that images may leave this machine.

    Raises:
      TypeError: If they are no `PublicImages`.
    """
    if not isinstance(images, PublicImages):
        raise TypeError(f"only PublicImages may be sent, got {type(images).__name__}")


def own_sha256(private: FederatedDataset) -> tuple[str, ...]:
    """Returns the `image_sha256` of each client's images, in the order of the data.

    Raises:
      UserError: If they are no 8-bit images in two dimensions.
    """
    images = private.images
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"data: a foundation model takes 8-bit images in two dimensions, but {private.name} "
            f"holds {images.dtype} {list(images.shape[1:])}; leave data.harmonize out"
        )
    return tuple(map(image_sha256, images))


def own_images(private: FederatedDataset) -> OwnImages:
    """Returns the distinct images of all clients, at the size of the run.

    Raises:
      UserError: If they are no 8-bit images in two dimensions.
    """
    sha256 = own_sha256(private)
    return OwnImages(private.images, sha256).take(_distinct(sha256))


def _distinct(sha256: Sequence[str]) -> list[int]:
    """Returns the places of distinct images; of identical ones, only the first is kept."""
    firsts = {sha: place for place, sha in reversed(list(enumerate(sha256)))}
    return sorted(firsts.values())


def clear_public(public: PublicDataset, private: FederatedDataset) -> PublicImages:
    """Returns the distinct public images after checking that no client has any of them.

    Images are compared by the SHA-256 of their RGB pixels at the size of the run
    (``data.image_size``), to which both sides are resized in the same way. Identical images are
    found at equal native sizes and after resizing. Every image of the private pool is checked:
    training, validation, test and unused images, and the images of examples that were left out
    because their mask cannot be used. A private image that was recompressed with loss, cropped, or
    resized in another way has another hash and is not found; neither is a volume that
    ``data.scanner_shift`` changed.

    Raises:
      TypeError: If ``public`` was not declared public.
      UserError: If a client has one of the images.
    """
    if not isinstance(public, PublicDataset) or not isinstance(private, FederatedDataset):
        raise TypeError(
            "clear_public takes a PublicDataset and a FederatedDataset, got "
            f"{type(public).__name__} and {type(private).__name__}"
        )
    left_out = () if private.left_out_images is None else private.left_out_images
    images = itertools.chain(private.images, left_out)
    pool = {image_sha256(image): row for row, image in enumerate(images)}
    shared = [
        (number, pool[sha])
        for number, (image, native) in enumerate(zip(public.images, public.sha256, strict=True))
        for sha in {image_sha256(image), native}
        if sha in pool
    ]
    if shared:
        number, row = shared[0]
        others = len({number for number, _ in shared}) - 1
        more = f"; so are {others} more" if others else ""
        raise UserError(
            f"public image {number} of {public.name} (sha256 {public.sha256[number]}) is "
            f"{_whose(private, row)}{more}; nothing was sent. Take it out of the public data"
        )
    rows = _distinct(public.sha256)
    distinct = tuple(public.sha256[row] for row in rows)
    return PublicImages(public.originals, rows, distinct, public.images.ndim == 5, _CLEARED)


def _whose(private: FederatedDataset, row: int) -> str:
    """Describes which client and split use the private image in ``row`` of the pool."""
    for client in private.clients:
        for part in ("train", "validation", "test"):
            places = np.flatnonzero(getattr(client, part) == row)
            if places.size:
                return (
                    f"private: {part} image {places[0]} of client {client.name} "
                    f"(row {row} of {private.name})"
                )
    if row >= len(private.images):
        return f"private: an image of {private.name}, left out by data.on_bad_example = skip"
    return f"private: row {row} of {private.name}, which no client uses in this run"
