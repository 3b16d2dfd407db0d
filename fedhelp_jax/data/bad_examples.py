"""Unusable examples, which either raise an error or are left out and listed with the reason."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fedhelp_jax.core.errors import UserError

# The list of unusable examples, next to a prepared data set or in a run folder.
QUARANTINE = "quarantine.csv"

_Values = TypeVar("_Values", bound=np.ndarray | list[Any] | tuple[Any, ...])


class BadExample(NamedTuple):
    """An example that was left out, and why; the fields are the columns of `QUARANTINE`.

    Attributes:
        split: The split that the source assigns it to; empty if there is none.
        client: The client or site that it belongs to; empty if that is not known.
        example: Its name.
        files: Its files inside the source.
        reason: What is wrong with the files.
    """

    split: str
    client: str
    example: str
    files: str
    reason: str = ""


class Unread(UserError):
    """A file that could not be read, but may be readable at the next attempt."""


class Bad:
    """The unusable examples of one source, by their position in it.

    Readers report bad examples here and keep their positions occupied until all are known. They
    then drop them before anything is counted, split or assigned to clients. The result is the same
    as if the source had never contained them.

    Args:
        skip: Whether to collect bad examples. If False, the first one raises its error.
        reasons: Reasons that are already known, by position.

    Attributes:
        reasons: Why each example is bad, by position; only the first reason is kept.
        lasting: Whether the examples would be bad again if they were read again.
    """

    def __init__(self, skip: bool = False, reasons: Mapping[int, str] | None = None):
        self.skip, self.reasons, self.lasting = skip, dict(reasons or {}), True

    def found(self, place: int, error: UserError) -> None:
        """Records a bad example; safe to call from several threads.

        Raises:
            UserError: `error`, unless bad examples are skipped.
        """
        if not self.skip:
            raise error
        self.reasons.setdefault(place, str(error))
        if isinstance(error, Unread):
            self.lasting = False

    def add(self, other: "Bad", first: int = 0) -> None:
        """Adds the bad examples of `other`, whose position 0 is position `first` here."""
        for place, reason in sorted(other.reasons.items()):
            self.reasons.setdefault(first + place, reason)

    def check(self, count: int, where: str) -> None:
        """Checks that no more than half of `count` examples are bad.

        Args:
            count: Number of examples, including bad ones.
            where: Key and source, for the message.

        Raises:
            UserError: More than half are bad, which means that something is wrong with the source.
        """
        if self.reasons:
            first = self.reasons[min(self.reasons)]
            refuse_too_many(len(self.reasons), count, f"{where}: ", "", first)

    def drop(self, values: _Values) -> _Values:
        """Returns `values`, which has one entry per example, without those of bad examples."""
        if not self.reasons:
            return values
        if isinstance(values, np.ndarray):
            return np.delete(values, sorted(self.reasons), axis=0)
        return type(values)(v for place, v in enumerate(values) if place not in self.reasons)

    def dropped(self, images: np.ndarray) -> np.ndarray | None:
        """Returns the images of those bad examples that could be decoded, or None.

        An image that could not be decoded is blank and is not returned.
        """
        places = [place for place in sorted(self.reasons) if images[place].any()]
        return images[places] if places else None

    def listed(self, describe: Callable[[int], BadExample]) -> tuple[BadExample, ...]:
        """Returns the bad examples in order of position.

        Args:
            describe: Returns all fields except the reason for the example at a position.
        """
        return tuple(
            describe(place)._replace(reason=reason)
            for place, reason in sorted(self.reasons.items())
        )


def refuse_too_many(bad: int, count: int, where: str, kind: str, first: str) -> None:
    """Raises an error if more than half of the examples are bad.

    Args:
        bad: Number of bad examples.
        count: Number of all examples.
        where: Beginning of the message.
        kind: What the examples are called, followed by a space; or empty.
        first: Reason of the first bad example.

    Raises:
        UserError: More than half are bad.
    """
    if bad > count / 2:
        raise UserError(
            f"{where}{bad} of {count} {kind}examples cannot be used: too many to be left out; the "
            f"first: {first}"
        )
