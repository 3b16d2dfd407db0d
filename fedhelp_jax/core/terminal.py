"""Lets a command go on when standard output or standard error are lost.

A terminal may be closed, the reader of a pipe may have ended (``fedhelp train | head``), or the
disk of a log may be full. None of this should stop hours of computing.
"""

import contextlib
import errno
import functools
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import IO, Any, TextIO, cast

from fedhelp_jax.core.storage import storage_fault

# Errors that mean nobody reads: a pipe without a reader, a closed descriptor, a lost terminal.
_NOBODY = (errno.EPIPE, errno.EBADF, errno.EIO)


@contextlib.contextmanager
def dispensable_terminal() -> Iterator[None]:
    """Makes writing to stdout and stderr never fail, and ignores SIGHUP, inside the context."""
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


def tell(text: str) -> None:
    """Prints a line at once, also where the output is a file or a pipe."""
    print(text, flush=True)


def is_output_lost() -> bool:
    """Returns whether some output was lost, other than because nobody reads it."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return isinstance(sys.stdout, _Lossy) and sys.stdout.is_cut_off


class _Lossy:
    """A text stream that drops what it cannot write."""

    def __init__(self, name: str, stream: TextIO | None):
        self.is_cut_off = False
        self._name = name
        # A stream that is closed from the start is None in Python (``>&-``, pythonw).
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")

    def __getattr__(self, name: str) -> Any:
        """Forwards everything but writing to the stream itself."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a character that the terminal cannot show
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
        """Flushes, so that Python's own flush at exit has nothing to complain about."""
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
    """Opens those of the descriptors 0 to 2 that are closed.

    Otherwise the next file to be opened could get such a number, and XLA, which writes its warnings
    to descriptor 2, would write them into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


@contextlib.contextmanager
def _hangup_ignored() -> Iterator[None]:
    """Ignores the signal of a lost terminal, as under ``nohup``."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGHUP"):
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if before is None else before)


def wrapped(text: str, stream: IO[str], indent: int = 0) -> str:
    """Returns a text in lines between whose words a terminal breaks; unchanged elsewhere.

    Args:
      text: The text.
      stream: Where it will be printed.
      indent: Number of spaces before further lines.
    """
    if not stream.isatty():
        return text
    fill = functools.partial(
        textwrap.fill,
        width=shutil.get_terminal_size().columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(map(fill, text.splitlines()))
