"""Defines the exceptions that the command line reports in one line, and helpers for messages."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix; the command line prints it and exits with status 2.

    The message is one line that names the key, file or value and says what would be valid.
    """


class Failure(Exception):
    """A run that failed or cannot be trusted; the command line prints it and exits with status 1.

    The message is one line that says what was found and what to do.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean ...?`` with the closest known name, or nothing if none is close."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def first_of(names: Sequence[str], most: int = 10) -> str:
    """Returns the first ``most`` names, separated by commas, and how many more there are.

    Example:
      >>> first_of(["a", "b", "c"], most=2)
      'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
