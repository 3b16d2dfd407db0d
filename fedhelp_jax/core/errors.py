"""Exceptions that the command line tells in one line, and words for such lines."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can mend; the command line prints it and exits with status 2.

    The message is one line that names the key, file or value and says what would be right.
    """


class Failure(Exception):
    """A run that cannot be trusted or went wrong; the command line prints it and exits with 1.

    The message is one line that says what was found, and what to do.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean ...?`` with the closest known name, or nothing if none is close."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def first_of(names: Sequence[str], most: int = 10) -> str:
    """Returns names, separated by commas, and how many more there are than ``most``.

    Example:
      >>> first_of(["a", "b", "c"], most=2)
      'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
