"""Standard output and error that a command can do without.

A terminal may be closed, the reader of a pipe may have seen enough (``fedhelp train | head``), and
the disk of a log may be full. None of this is a reason to stop hours of computing.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast

from fedhelp_jax.core.storage import storage_fault

# Nobody is there to read: a pipe without a reader, a closed descriptor, a terminal that is gone.
_NOBODY = (errno.EPIPE, errno.EBADF, errno.EIO)


@contextlib.contextmanager
def dispensable_terminal() -> Iterator[None]:
    """While this lasts, writing to stdout and stderr never fails, and SIGHUP is ignored."""
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    streams = _Lossy("stdout", before[0]), _Lossy("stderr", before[1])
    sys.stdout, sys.stderr = cast(tuple[TextIO, TextIO], streams)
    try:
        with _hangup_ignored():
            yield
    finally:
        for stream in streams:
            stream.finish()
        sys.stdout, sys.stderr = before


def is_output_lost() -> bool:
    """Whether something that was printed is missing, and not because nobody reads it."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return isinstance(sys.stdout, _Lossy) and sys.stdout.is_cut_off


class _Lossy:
    """A text stream that drops what it cannot write."""

    def __init__(self, name: str, stream: TextIO | None):
        self.is_cut_off = False
        self._name = name
        # Python sets a stream to None that is closed from the start (``>&-``, pythonw).
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")

    def __getattr__(self, name: str) -> Any:
        """What is not about writing is as it is of the stream itself."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a letter that the terminal does not have
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def finish(self) -> None:
        """Flushes, so that Python, which does so at its exit, finds nothing to complain of."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def _drop(self, error: OSError | ValueError) -> None:
        reason = storage_fault(error)
        if reason is None or getattr(error, "errno", None) in _NOBODY or self.is_cut_off:
            return
        self.is_cut_off = True
        if self._name == "stdout":
            print(f"fedhelp: {self._name}: {reason}; it will be cut off", file=sys.stderr)


def _fill_closed_descriptors() -> None:
    """Opens descriptors 0 to 2 where they are closed.

    Otherwise the next file to be opened gets such a number, and XLA, which writes its warnings to
    descriptor 2, writes them into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


@contextlib.contextmanager
def _hangup_ignored() -> Iterator[None]:
    """The signal of a lost terminal does nothing, as under ``nohup``."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGHUP"):
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if before is None else before)
