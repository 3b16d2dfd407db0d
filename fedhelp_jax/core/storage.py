"""Writing to disk: a file is whole or as it was, and what the disk refuses is told in one line."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from fedhelp_jax.core.errors import UserError

# Full, over quota, beyond the size that the shell allows a file, read-only, failing, gone.
_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


class StorageError(UserError):
    """A file could not be written; the message names it and says what the system says."""


def storage_fault(error: BaseException) -> str | None:
    """Returns what the system says of the disk, if that is what an error comes from.

    Libraries in C++ (TensorStore, array_record) raise errors of other kinds, whose text ends in the
    system's words.

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
    """Raises what the disk refuses inside as a `StorageError`.

    Args:
        path: What is written inside, so that any error of the system is about it. None takes
            faults of the disk only, and the file that the error names.

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
    """Gives a path to write to, which then takes the place of ``path``.

    The old file stands until the new one is whole and on disk. If the writing fails, nothing is
    left of the new one.

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
    """Adds a line to a file, which may end in a part of it if that fails.

    Raises:
        StorageError: If it cannot be written.
    """
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
