"""The store of answers: a folder on disk, so that each image is asked about only once.

The store is an LMDB database. Every batch of answers is one transaction, so a killed process leaves
only complete answers. Readers map the database into memory and never wait. Keys combine the
fingerprint of the foundation model and the hash of the image. The folder must not be written to by
several hosts over a network file system, which LMDB does not support.
"""

import errno
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.locks import exclusive_lock
from fedhelp_jax.teachers.answers import log_probabilities
from fedhelp_jax.teachers.base import Fingerprint

if TYPE_CHECKING:
    import lmdb

_T = TypeVar("_T")
_VERSION = 1
# Version, bytes per number, numbers kept of each row (0: all), nats lost, number of axes.
_HEADER = struct.Struct("<BBHfB")
_FLOATS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_FREE_BYTES = 2**30  # reserved in the memory map, not on disk: the file grows as it fills


class Precision(NamedTuple):
    """The precision at which answers are kept.

    Attributes:
      dtype: "float32" or "float16".
      top_k: The number of largest logits to keep; the other classes share the remaining probability
        evenly. None keeps all.
    """

    dtype: str = "float32"
    top_k: int | None = None

    def covers(self, other: "Precision") -> bool:
        """Returns whether answers kept at this precision can be reduced to ``other``."""
        wide = _FLOATS[self.dtype].itemsize >= _FLOATS[other.dtype].itemsize
        if self.top_k is None:
            return wide
        return wide and other.top_k is not None and self.top_k >= other.top_k


class Stored(NamedTuple):
    """A stored answer: float32 ``[*spatial, P]``, its precision, and the nats lost by storing it.

    ``truncation_kl`` is ``KL(softmax(answer) || softmax(as stored))``, averaged over pixels. With
    one class, the KL divergence is between the sigmoids.
    """

    answer: np.ndarray
    precision: Precision
    truncation_kl: float


def encode(answer: np.ndarray, precision: Precision) -> bytes:
    """Returns an answer, float32 ``[*spatial, P]``, encoded as a record of the store.

    Raises:
      UserError: If a logit is outside the range of ``precision.dtype``.
    """
    dtype, classes = _FLOATS[precision.dtype], answer.shape[-1]
    limit = float(np.finfo(dtype).max)
    if np.abs(answer).max(initial=0.0) > limit:
        raise UserError(f"teacher.dtype: a logit is beyond {limit:g}; use float32")
    top_k = precision.top_k if precision.top_k is not None and precision.top_k < classes else 0
    if top_k:
        # The sort is stable, so ties are broken by class index.
        kept, left = np.split(np.argsort(-answer, axis=-1, kind="stable"), [top_k], axis=-1)
        others = np.take_along_axis(answer, left, axis=-1)
        payload = (
            kept.astype("<u4").tobytes()
            + np.take_along_axis(answer, kept, axis=-1).astype(dtype).tobytes()
            + np.logaddexp.reduce(others.astype(np.float64), axis=-1).astype("<f4").tobytes()
        )
    else:
        payload = answer.astype(dtype).tobytes()
    axes = struct.pack(f"<{answer.ndim}I", *answer.shape)

    def record(truncation_kl: float) -> bytes:
        header = _HEADER.pack(_VERSION, dtype.itemsize, top_k, truncation_kl, answer.ndim)
        return header + axes + payload

    return record(_nats_lost(answer, decode(record(0.0)).answer))


def decode(record: Any) -> Stored:
    """Returns the answer in a record, given as bytes or a view of them."""
    precision, truncation_kl, shape, start = _header(record)
    dtype, top_k = _FLOATS[precision.dtype], precision.top_k
    rows, classes = math.prod(shape[:-1]), shape[-1]
    if top_k is None:
        answer = np.frombuffer(record, dtype, rows * classes, start).reshape(shape)
        return Stored(answer.astype(np.float32), precision, truncation_kl)
    count = rows * top_k
    kept = np.frombuffer(record, "<u4", count, start).reshape(rows, top_k)
    values = np.frombuffer(record, dtype, count, start + 4 * count).reshape(rows, top_k)
    others = np.frombuffer(record, "<f4", rows, start + (4 + dtype.itemsize) * count)
    answer = np.repeat((others - np.log(classes - top_k))[:, None], classes, axis=1)
    np.put_along_axis(answer, kept.astype(np.int64), values.astype(np.float32), axis=1)
    answer = answer.astype(np.float32).reshape(shape)
    return Stored(answer, precision, truncation_kl)


def _header(record: Any) -> tuple[Precision, float, tuple[int, ...], int]:
    """Returns the precision, the nats lost, the answer's shape, and the offset of its numbers."""
    version, itemsize, top_k, truncation_kl, ndim = _HEADER.unpack_from(record)
    if version != _VERSION:
        raise UserError(f"teacher.store: holds records of version {version}, this reads {_VERSION}")
    shape = struct.unpack_from(f"<{ndim}I", record, _HEADER.size)
    name = next(name for name, dtype in _FLOATS.items() if dtype.itemsize == itemsize)
    return Precision(name, top_k or None), truncation_kl, shape, _HEADER.size + 4 * ndim


def _nats_lost(answer: np.ndarray, stored: np.ndarray) -> float:
    before, after = log_probabilities(answer), log_probabilities(stored)
    return float(np.mean(np.sum(np.exp(before) * (before - after), axis=-1)))


def _length(env: "lmdb.Environment") -> int:
    """Returns the minimum size in bytes of the file of an undamaged database."""
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"]


def _number(record: Any) -> int:
    return 0 if record is None else int(bytes(record))


class AnswerStore:
    """The answers of one foundation model in a store, as a context manager around the open file.

    Args:
      folder: The folder of the store.
      fingerprint: The foundation model whose answers are stored.
      precision: The precision at which answers are kept and read. Answers that are stored more
        precisely are reduced to it when read.
      write: Whether answers will be added; creates the folder if it does not exist.

    Raises:
      UserError: If the store cannot be opened.
    """

    def __init__(
        self, folder: Path, fingerprint: Fingerprint, precision: Precision, *, write: bool = False
    ):
        self._folder, self._fingerprint, self._precision = folder, fingerprint, precision
        self._id = bytes.fromhex(fingerprint.digest)
        self._writing = threading.Lock()
        self._env: lmdb.Environment | None = None
        if write or (folder / "data.mdb").exists():
            self._env = self._open(write)

    def __enter__(self) -> "AnswerStore":
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the file."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def read(self, sha256: Sequence[str]) -> dict[str, Stored]:
        """Returns the stored answers about images, by hash; images without one are left out.

        Answers kept at less than the requested precision are ignored. Answers kept at more are
        reduced to it.
        """
        return self._each(sha256, lambda record: self._reduced(decode(record)))

    def known(self, sha256: Sequence[str]) -> set[str]:
        """Returns the hashes of images whose stored answer is precise enough."""
        return set(self._each(sha256, lambda record: None))

    def truncation_kl(self, sha256: Sequence[str]) -> dict[str, float]:
        """Returns the `Stored.truncation_kl` of each answer that `read` returns, by hash."""

        def lost(record: Any) -> float:
            precision, truncation_kl, *_ = _header(record)
            whole = self._precision.covers(precision)
            return truncation_kl if whole else self._reduced(decode(record)).truncation_kl

        return self._each(sha256, lost)

    def put(self, sha256: Sequence[str], answers: np.ndarray) -> None:
        """Adds answers, float32 ``[B, ..., P]``, either all or none.

        Raises:
          UserError: If their shape differs from that of stored answers, or the disk is full.
        """
        records = [encode(answer, self._precision) for answer in answers]
        about = {**self._fingerprint._asdict(), "shape": list(answers.shape[1:])}

        def write(transaction: "lmdb.Transaction") -> None:
            before = transaction.get(self._key(b"f"))
            if before is None:
                transaction.put(self._key(b"f"), json.dumps(about).encode())
            elif (shape := json.loads(bytes(before))["shape"]) != about["shape"]:
                raise UserError(
                    f"teacher: {self._fingerprint.name} answered {about['shape']}, but "
                    f"{shape} before; is it still the same model? "
                    "Give it another teacher.version"
                )
            for sha, record in zip(sha256, records, strict=True):
                transaction.put(self._key(b"a", sha), record)

        self._write(write)

    @property
    def sent(self) -> int:
        """The number of images ever sent to the model, counting every attempt."""
        if self._env is None:
            return 0
        return self._read(lambda transaction: _number(transaction.get(self._key(b"q"))))

    def consume_quota(self, images: int, limit: int | None) -> None:
        """Counts images that are about to be sent.

        Raises:
          UserError: If the total would exceed ``limit``; then none are counted.
        """

        def write(transaction: "lmdb.Transaction") -> None:
            total = _number(transaction.get(self._key(b"q"))) + images
            if limit is not None and total > limit:
                raise UserError(
                    f"teacher.max_queries = {limit} is spent: {total - images} images were sent to "
                    f"{self._fingerprint.name} so far, tries counted; what it answered is kept"
                )
            transaction.put(self._key(b"q"), str(total).encode())

        self._write(write)

    @contextmanager
    def exclusive_lock(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Locks this model, so that no other process asks it.

        The operating system frees the lock if this process is killed.

        Args:
          on_wait: Called once if another process holds the lock.
        """
        lock = self._folder / f"{self._fingerprint.digest[:16]}.lock"
        what = f"teacher.store: {self._folder}"
        with exclusive_lock(lock, what, on_wait=lambda holder: on_wait()):
            yield

    def _each(self, sha256: Sequence[str], about: Callable[[Any], _T]) -> dict[str, _T]:
        """Returns ``about(record)`` of each record that is precise enough, by hash."""
        if self._env is None:
            return {}

        def read(transaction: "lmdb.Transaction") -> dict[str, _T]:
            found = {}
            for sha in sha256:
                record = transaction.get(self._key(b"a", sha))
                if record is not None and _header(record)[0].covers(self._precision):
                    found[sha] = about(record)
            return found

        return self._read(read)

    def _key(self, kind: bytes, sha: str = "") -> bytes:
        return kind + self._id + bytes.fromhex(sha)

    def _reduced(self, stored: Stored) -> Stored:
        if self._precision.covers(stored.precision):
            return stored
        less = decode(encode(stored.answer, self._precision))
        return less._replace(truncation_kl=stored.truncation_kl + less.truncation_kl)

    def _open(self, write: bool) -> "lmdb.Environment":
        import lmdb

        with self._guarded():
            if write:
                self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / "data.mdb"
            size = file.stat().st_size if file.exists() else 0
            # Readers also need the lock file, unless the folder is read-only.
            lock = os.access(self._folder, os.W_OK)
            map_size = 2 * size + _FREE_BYTES
            try:
                opened = lmdb.open(
                    str(self._folder), map_size=map_size, readonly=not write, lock=lock
                )
            except lmdb.Error:
                if write and not size:  # on a full disk, LMDB may leave part of its first pages
                    file.unlink(missing_ok=True)
                raise
            # Reading a missing page of the memory map would kill the process.
            if size and _length(opened) > file.stat().st_size:
                opened.close()
                raise UserError(
                    f"teacher.store: {self._folder} cannot be used (data.mdb is cut off, its "
                    f"{size} bytes are not all); copy it again"
                )
            return opened

    def _read(self, look: Callable[["lmdb.Transaction"], _T]) -> _T:
        import lmdb

        assert self._env is not None
        with self._guarded():
            while True:
                try:
                    with self._env.begin(buffers=True) as transaction:
                        return look(transaction)
                except lmdb.MapResizedError:  # another process made it larger
                    self._env.set_mapsize(0)

    def _write(self, change: Callable[["lmdb.Transaction"], _T]) -> _T:
        import lmdb

        assert self._env is not None
        with self._writing, self._guarded():
            while True:
                try:
                    with self._env.begin(write=True) as transaction:
                        result = change(transaction)
                    # LMDB never writes free pages at the end, so the file would look cut off.
                    file, length = self._folder / "data.mdb", _length(self._env)
                    if file.stat().st_size < length:
                        os.truncate(file, length)
                    return result
                except lmdb.MapFullError:
                    self._env.set_mapsize(2 * self._env.info()["map_size"])
                except lmdb.MapResizedError:  # another process made it larger
                    self._env.set_mapsize(0)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns errors of the disk and of LMDB into a one-line `UserError`."""
        import lmdb

        try:
            yield
        except (lmdb.MapFullError, lmdb.MapResizedError):
            raise
        except (lmdb.Error, OSError) as error:
            # LMDB reports a partial write as EIO.
            hint = "; is the disk full?" if os.strerror(errno.EIO) in str(error) else ""
            raise UserError(
                f"teacher.store: {self._folder} cannot be used ({error}{hint}); answers stored "
                "before are kept"
            ) from None
