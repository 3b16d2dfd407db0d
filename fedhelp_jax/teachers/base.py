"""What a foundation model is, and what may be shown to one: public images, and nothing else.

Everything that leaves for a foundation model is a `PublicImages`, and `clear_public` alone makes
one, from a data set declared public that shares no image with any client.
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
    """What decides a foundation model's answers, known without asking it.

    Attributes:
      name: The model.
      version: Which one of that name, such as a hash of its file.
      preprocessing: What is done to an image, and which output is taken.
      label_names: ``[P]`` its classes; empty where it gives embeddings.
    """

    name: str
    version: str
    preprocessing: str
    label_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all four; answers are stored under it."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()

    def __str__(self) -> str:
        """For tables: all but the classes."""
        return f"{self.name} {self.version} ({self.preprocessing})"


class TransientError(Exception):
    """The model did not answer, but may if it is asked again.

    Args:
      message: What happened.
      retry_after: Seconds it asks to be left alone, if it said so.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class PublicImages:
    """Public images at their native sizes; no client has any of them.

    Made by `clear_public` and by `take` only, so that a client's examples cannot become one.
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
        """The number of images."""
        return len(self._rows)

    def take(self, places: Sequence[int]) -> "PublicImages":
        """Some of the images, in the order of ``places``."""
        rows = [self._rows[place] for place in places]
        sha256 = tuple(self.sha256[place] for place in places)
        return PublicImages(self._originals, rows, sha256, self._volumes, _CLEARED)

    @property
    def sha256(self) -> tuple[str, ...]:
        """Each image's hash, as `image_sha256` of its native pixels."""
        return self._sha256

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Each image's shape, ``(H, W)``, ``(H, W, channels)``, or ``(D, H, W)`` of a volume."""
        return [self._originals[row].shape for row in self._rows]

    @property
    def pixels(self) -> np.ndarray:
        """The images as one array; they must be of one shape.

        Returns:
          uint8 ``[B, H, W, C]``.

        Raises:
          UserError: If an image is not the one that was cleared, or is a volume.
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


class FoundationModel(Protocol):
    """A model that answers about public images; made without any network or heavy library.

    Attributes:
      fingerprint: What decides its answers.
      batch_limit: Most images it takes at once; None if it does not matter.
    """

    fingerprint: Fingerprint
    batch_limit: int | None

    def open(self) -> None:
        """Makes ready to be asked, as far as that sends nothing: reads the file, or the key.

        Raises:
          UserError: If that cannot be had.
        """
        ...

    def answer(self, images: PublicImages) -> np.ndarray:
        """Returns float32 ``[B, P]`` logits or embeddings, or ``[B, *spatial, P]`` of masks.

        Raises:
          TransientError: If asking again may help.
          UserError: If it will not.
        """
        ...

    def request_bytes(self, images: PublicImages) -> int:
        """Returns how many bytes leave this machine to have ``images`` answered."""
        ...

    def close(self) -> None:
        """Lets go of connections and files."""
        ...


def clear_public(public: PublicDataset, private: FederatedDataset) -> PublicImages:
    """Returns the distinct public images, once it is sure that no client has any of them.

    Images are compared by the SHA-256 of their pixels as RGB at the size of the run
    (``data.image_size``), to which both sides are resized alike: equal pictures are found at equal
    native sizes, and after resizing. Every image of the private pool counts, training, validation,
    test or unused, and those of examples that were left out because their mask cannot be used. A
    private picture that was saved anew with loss, cropped, or resized otherwise is another picture
    by any hash, and is not found; nor is a volume that ``data.scanner_shift`` changed.

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
    # The first of identical images stands for all.
    firsts = {sha: number for number, sha in reversed(list(enumerate(public.sha256)))}
    rows = sorted(firsts.values())
    distinct = tuple(public.sha256[row] for row in rows)
    return PublicImages(public.originals, rows, distinct, public.images.ndim == 5, _CLEARED)


def _whose(private: FederatedDataset, row: int) -> str:
    """Returns whose private image stands in a row of the pool, and where."""
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
