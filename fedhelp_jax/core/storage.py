"""Writes to disk: a file is either complete or unchanged, and disk errors are told in one line."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from fedhelp_jax.core.errors import UserError

# Disk full, over quota, beyond the shell's limit for a file, read-only, failing, gone.
_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


class StorageError(UserError):
    """Raised if a file could not be written; the message names it and the system's reason."""


def storage_fault(error: BaseException) -> str | None:
    """Returns the system's description of a disk fault, or None if an error has another cause.

    Libraries in C++ (TensorStore, array_record) raise other kinds of errors, whose text contains
    the system's description.

    Example:
        >>> storage_fault(RuntimeError("write() failed: No space left on device; writing x"))
        'No space left on device'
        >>> storage_fault(FileNotFoundError(2, "No such file or directory"))
    """
    if isinstance(error, OSError) and error.errno in _FAULTS:
        return os.strerror(error.errno)
    text = str(error)
    return next((words for words in map(os.strerror, _FAULTS) if words in text), None)


@contextlib.contextmanager
def storage_errors(path: Path | None = None) -> Iterator[None]:
    """Turns disk errors in its body into a `StorageError`.

    Args:
        path: The file that the body writes, so that any system error is about it. None converts
            only faults of the disk, and reports the file that the error names.

    Raises:
        StorageError: If something could not be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = storage_fault(error)
        if reason is None and path is not None and isinstance(error, OSError):
            reason = error.strerror or str(error)
        if reason is None:
            raise
        named = path or getattr(error, "filename", None)
        said = f"{named}: {reason}" if named else str(error)
        raise StorageError(" ".join(said.split())) from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which then replaces ``path``.

    The old file stays until the new one is complete and on disk. If writing fails, nothing is left
    of the new one.

    Raises:
        StorageError: If it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        try:
            yield beside
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file; if that fails, the file may end in part of the line.

    Raises:
        StorageError: If it cannot be written.
    """
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
