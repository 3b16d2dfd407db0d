"""Locks files and folders for one writer at a time; a lock ends with the process that holds it.

The operating system holds the lock on a file that is never removed, and releases it when the
process ends, however it ends. A second file, ``<lock>.holder``, names that process. On some
clusters, locks do not reach other hosts (Lustre with ``localflock``, BeeGFS by default), or do not
exist. Therefore the holder keeps renewing the modification time of the second file, which other
hosts can watch.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedhelp_jax.core.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_log = logging.getLogger(__name__)

_BEAT = 10.0  # seconds between two renewals
_PATIENCE = 2.5  # beats without a renewal after which a holder on another host counts as ended
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # errors of file systems without locks


class Holder(NamedTuple):
    """The process that holds a lock."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Locks a folder for writing; in a run of many processes, the first one holds it for all.

    Args:
        folder: The folder; created if it does not exist.

    Raises:
        UserError: If another process writes to it.
    """
    from fedhelp_jax.core import distributed  # imports jax

    with contextlib.ExitStack() as stack:

        def take() -> None:
            if distributed.is_coordinator():
                stack.enter_context(exclusive_lock(folder / ".lock", f"--workdir={folder}"))

        distributed.run_on_all(take)
        yield


@contextlib.contextmanager
def exclusive_lock(
    path: Path, what: str, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Holds the lock file ``path``.

    Args:
        path: The lock file; its folder is created if it does not exist.
        what: The key or flag and the folder that is written to, for messages.
        on_wait: Called once with the holder of the lock before waiting for it. None raises an error
            instead of waiting.

    Raises:
        UserError: If another process holds the lock and ``on_wait`` is None, or the file cannot be
            written.
    """
    from filelock import FileLock, Timeout

    lock, noted = FileLock(path), path.with_name(f"{path.name}.holder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                _acquire(lock, noted)
                break
            except Timeout:
                holder = _read(noted)
            said = "another process" if holder is None else str(holder)
            if on_wait is None:
                raise UserError(
                    f"{what}: {said} writes to it; wait until that one has ended, or name "
                    "another folder"
                )
            on_wait(said)
            on_wait = _say_nothing
            time.sleep(0.2)
    except OSError as error:
        raise UserError(
            f"{what}: cannot be written to ({error.strerror or error}); name another folder"
        ) from None
    ended = threading.Event()
    beat = threading.Thread(target=_renew, args=(noted, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        noted.unlink(missing_ok=True)
        lock.release()


def _say_nothing(holder: str) -> None:
    del holder


def _acquire(lock: "BaseFileLock", noted: Path) -> None:
    """Takes the lock and records its holder.

    Raises:
        Timeout: If another process holds it.
        OSError: If the file cannot be written.
    """
    from filelock import Timeout

    reaches_all = True
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:
        reaches_all = False
    except OSError as error:  # Timeout is a subclass
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
        reaches_all = False
    try:
        before = _read(noted)
        ours = Holder(os.getpid(), socket.gethostname())
        # If locks work, a previous holder on this host has certainly ended, as we have its lock.
        if before is not None and not (reaches_all and before.host == ours.host):
            _log.warning("%s held %s; looking whether it still runs", before, noted.parent)
            if _is_renewed(noted):
                raise Timeout(str(lock.lock_file))
            _log.warning("it does not: taking over from it")
        with contextlib.suppress(OSError):  # a full disk: the lock works without the note
            noted.write_text(json.dumps(ours._asdict()), encoding="utf-8")
    except BaseException:
        lock.release()
        raise


def _read(noted: Path) -> Holder | None:
    try:
        return Holder(**json.loads(noted.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _renew(noted: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(noted)


def _is_renewed(noted: Path) -> bool:
    """Returns whether the modification time of the file changes while it is watched."""
    before, until = _time(noted), time.monotonic() + _PATIENCE * _BEAT
    while (now := _time(noted)) == before and time.monotonic() < until:
        time.sleep(_BEAT / 10)
    return now is not None and now != before  # if the file is gone, the lock was released


def _time(noted: Path) -> int | None:
    try:
        with noted.open() as file:  # a network file system refreshes on open
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None
