"""Examples that cannot be used: refused, or left out and listed with the reason."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fedhelp_jax.core.errors import UserError

# Lists them, beside a prepared set or in a run folder.
QUARANTINE = "quarantine.csv"

_Values = TypeVar("_Values", bound=np.ndarray | list[Any] | tuple[Any, ...])


class BadExample(NamedTuple):
    """An example that was left out, and why; the fields are columns of `QUARANTINE`.

    Attributes:
        split: The split of the source that it is in; empty where there is none.
        client: The client or site whose it is; empty where that is not known.
        example: Its name.
        files: Its files inside the source.
        reason: What is wrong with them.
    """

    split: str
    client: str
    example: str
    files: str
    reason: str = ""


class Unread(UserError):
    """A file that could not be read this time; the next time it may be."""


class Bad:
    """The examples of one source that cannot be used, by their places in it.

    Readers report them here, keep their places until all are known, and drop them before anything
    is counted, split or shared out. So what is left is as if the source had never held them.

    Args:
        skip: Collect them; else the first one is raised.

    Attributes:
        reasons: Why each is bad, by its place; the first reason counts.
        lasting: Whether they would be bad again if they were read anew.
    """

    def __init__(self, skip: bool = False, reasons: Mapping[int, str] | None = None):
        self.skip, self.reasons, self.lasting = skip, dict(reasons or {}), True

    def found(self, place: int, error: UserError) -> None:
        """Takes note of a bad example; safe to call from several threads.

        Raises:
            UserError: `error`, if bad examples are not to be skipped.
        """
        if not self.skip:
            raise error
        self.reasons.setdefault(place, str(error))
        if isinstance(error, Unread):
            self.lasting = False

    def add(self, other: "Bad", first: int = 0) -> None:
        """Takes over what another one collected, whose place 0 is `first` here."""
        for place, reason in sorted(other.reasons.items()):
            self.reasons.setdefault(first + place, reason)

    def check(self, count: int, where: str) -> None:
        """Checks that no more than half of `count` examples are bad.

        Args:
            count: How many examples there are, bad ones too.
            where: Key and source, for the message.

        Raises:
            UserError: They are: then something is wrong with the source.
        """
        if self.reasons:
            first = self.reasons[min(self.reasons)]
            refuse_too_many(len(self.reasons), count, f"{where}: ", "", first)

    def drop(self, values: _Values) -> _Values:
        """Returns values, one for each example, without those of bad examples."""
        if not self.reasons:
            return values
        if isinstance(values, np.ndarray):
            return np.delete(values, sorted(self.reasons), axis=0)
        return type(values)(v for place, v in enumerate(values) if place not in self.reasons)

    def dropped(self, images: np.ndarray) -> np.ndarray | None:
        """Returns the images of bad examples that were decoded; the others are blank."""
        places = [place for place in sorted(self.reasons) if images[place].any()]
        return images[places] if places else None

    def listed(self, describe: Callable[[int], BadExample]) -> tuple[BadExample, ...]:
        """Returns the bad examples in their order.

        Args:
            describe: All but the reason, by the place.
        """
        return tuple(
            describe(place)._replace(reason=reason)
            for place, reason in sorted(self.reasons.items())
        )


def refuse_too_many(bad: int, count: int, where: str, kind: str, first: str) -> None:
    """Refuses to leave out more than half of some examples.

    Args:
        bad: How many are bad.
        count: How many there are.
        where: What the message begins with.
        kind: What they are called, with a blank behind it.
        first: The reason of the first.

    Raises:
        UserError: More than half are bad.
    """
    if bad > count / 2:
        raise UserError(
            f"{where}{bad} of {count} {kind}examples cannot be used: too many to be left out; the "
            f"first: {first}"
        )
