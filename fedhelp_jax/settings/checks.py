"""What a setting must be, and what must hold for it to have an effect."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple


class Check(NamedTuple):
    """A test of one value, and the words for what passes it, to be read after "must be"."""

    passes: Callable[[Any], bool]
    right: str
    choices: tuple[str, ...] = ()


def at_least(low: float) -> Check:
    """`low` or more."""
    return Check(lambda value: value >= low, f"at least {low:g}")


def whole(low: int) -> Check:
    """A whole number of `low` or more that 32 bits hold, as compiled programs count."""
    return Check(lambda value: low <= value < 2**31, f"at least {low} and less than 2**31")


def more_than(low: float) -> Check:
    """More than `low`."""
    return Check(lambda value: value > low, f"more than {low:g}")


def within(low: float, high: float, *, closed: bool) -> Check:
    """Between `low` (never itself) and `high` (itself too where `closed`)."""
    if closed:
        return Check(lambda value: low < value <= high, f"more than {low:g} and at most {high:g}")
    return Check(lambda value: low < value < high, f"more than {low:g} and less than {high:g}")


def between(low: float, high: float) -> Check:
    """From `low` to `high`, both included."""
    return Check(lambda value: low <= value <= high, f"from {low:g} to {high:g}")


def one_of(*names: str) -> Check:
    """Any of `names`."""
    return Check(lambda value: value in names, f"one of {', '.join(names)}", names)


def one_of_or(prefix: str, *names: str) -> Check:
    """Any of `names`, or what begins with `prefix`."""
    known = one_of(*names)
    return Check(
        lambda value: value in names or (value.startswith(prefix) and value != prefix),
        f"{known.right}, or {prefix}NAME",
        names,
    )


def some_of(*names: str) -> Check:
    """A tuple of some of `names`, each once."""
    return Check(
        lambda values: set(values) <= set(names) and len(set(values)) == len(values),
        f"some of {', '.join(names)}, each once",
        names,
    )


LOCAL = Check(
    lambda value: "://" not in value,
    "a path of this machine; mount what lies in a bucket as a folder, or copy it",
)
COUNT = whole(1)
FRACTION = within(0, 1, closed=True)
SEED = Check(lambda value: 0 <= value < 2**32, "at least 0 and less than 2**32")


class Use(NamedTuple):
    """A condition without which a setting changes nothing: what another setting must be.

    Attributes:
        key: The other setting.
        values: What it must be one of; a text that ends in a colon stands for all that begin so.
        other: It must be none of them instead.
    """

    key: str
    values: tuple[Any, ...]
    other: bool = False

    def holds(self, config: Any) -> bool:
        """Returns whether the condition holds in a `fedhelp_jax.experiments.config.RunConfig`."""
        value = attrgetter(self.key)(config)
        prefixes = tuple(v for v in self.values if isinstance(v, str) and v.endswith(":"))
        found = value in self.values or (isinstance(value, str) and value.startswith(prefixes))
        return found != self.other

    def __str__(self) -> str:
        *rest, last = map(str, self.values)
        values = f"{', '.join(rest)} or {last}" if rest else last
        return (
            f"{self.key.replace('.settings.', '.')} {'other than' if self.other else '='} {values}"
        )


class Either(NamedTuple):
    """A condition of which one of several others is enough."""

    uses: tuple[Use, ...]

    def holds(self, config: Any) -> bool:
        """As of `Use`."""
        return any(use.holds(config) for use in self.uses)

    def __str__(self) -> str:
        return " or ".join(map(str, self.uses))


def either(*uses: Use) -> Either:
    """For settings that have an effect where one of some conditions holds."""
    return Either(uses)


def where(key: str, *values: Any) -> Use:
    """For settings that have an effect only where another one has one of some values."""
    return Use(key, values)


def unless(key: str, *values: Any) -> Use:
    """For settings that have an effect only where another one has none of some values."""
    return Use(key, values, other=True)
