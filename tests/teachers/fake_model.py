"""A foundation model in this process, which answers from pixels and remembers what it was asked."""

import threading
from collections import Counter
from collections.abc import Callable

import numpy as np

from fedhelp_jax.teachers.base import Fingerprint, PublicImages


class FakeModel:
    """Answers logits that depend on each image's hash alone.

    Args:
        name: Of the model; another name answers otherwise.
        labels: Its classes.
        before: Called with the number of the request, from 0, before it is answered; may raise.
        batch_limit: As `FoundationModel` has it.
        bytes_an_image: What a request holds of each image, besides 100 bytes.

    Attributes:
        asked: The hashes of each request, as they began.
        busiest: Most requests that were under way at once.
        opened: How often it was made ready to be asked.
        closed: How often it was closed.
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
        """The answer about an image."""
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
        """How often each image was asked about."""
        return Counter(sha for request in self.asked for sha in request)
