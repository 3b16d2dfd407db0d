"""A fake foundation model in the test process, which records what it was asked."""

import threading
from collections import Counter
from collections.abc import Callable

import numpy as np

from fedhelp_jax.teachers.base import Fingerprint, PublicImages


class FakeModel:
    """Answers with logits that depend only on the model's name and each image's hash.

    Args:
        name: Name of the model; models with other names give other answers.
        labels: Classes of the model.
        before: Called with the number of a request, from 0, before it is answered; may raise.
        batch_limit: See `FoundationModel`.
        bytes_an_image: Request bytes per image, added to 100 bytes; 0 for a local model.

    Attributes:
        asked: The hashes in each request, in the order in which requests began.
        busiest: Largest number of concurrent requests.
        opened: How often the model was opened.
        closed: How often the model was closed.
    """

    def __init__(
        self,
        name: str = "fake",
        labels: tuple[str, ...] = ("a", "b", "c", "d"),
        *,
        before: Callable[[int], None] = lambda number: None,
        batch_limit: int | None = None,
        bytes_an_image: int = 0,
    ):
        self.fingerprint = Fingerprint(name, "version 1", "native size", labels)
        self.batch_limit, self._bytes = batch_limit, bytes_an_image
        self._before = before
        self._lock = threading.Lock()
        self.asked: list[tuple[str, ...]] = []
        self.busiest = self._busy = self.opened = self.closed = 0

    def expected(self, sha: str) -> np.ndarray:
        """Returns the answer about an image."""
        seeds = [len(self.fingerprint.name), *self.fingerprint.name.encode(), int(sha[:12], 16)]
        rng = np.random.default_rng(seeds)
        return rng.normal(size=len(self.fingerprint.label_names)).astype(np.float32)

    def open(self) -> None:
        """See `FoundationModel`."""
        self.opened += 1

    def answer(self, images: PublicImages) -> np.ndarray:
        """See `FoundationModel`."""
        assert len(images.pixels) == len(images)
        with self._lock:
            number = len(self.asked)
            self.asked.append(images.sha256)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            self._before(number)
            return np.stack([self.expected(sha) for sha in images.sha256])
        finally:
            with self._lock:
                self._busy -= 1

    def request_bytes(self, images: PublicImages) -> int:
        """See `FoundationModel`."""
        return self._bytes and 100 + self._bytes * len(images)

    def close(self) -> None:
        """See `FoundationModel`."""
        self.closed += 1

    @property
    def received(self) -> Counter[str]:
        """The number of times that each image was asked about."""
        return Counter(sha for request in self.asked for sha in request)
