"""Checks of the values of settings, and conditions under which settings have an effect."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple


class Check(NamedTuple):
    """A test of one value, and a description of valid values that completes "must be ..."."""

    passes: Callable[[Any], bool]
    right: str
    choices: tuple[str, ...] = ()


def at_least(low: float) -> Check:
    """Accepts numbers of at least `low`."""
    return Check(lambda value: value >= low, f"at least {low:g}")


def whole(low: int) -> Check:
    """Accepts numbers of at least `low` that fit in 32 bits, the integers of compiled programs."""
    return Check(lambda value: low <= value < 2**31, f"at least {low} and less than 2**31")


def more_than(low: float) -> Check:
    """Accepts numbers of more than `low`."""
    return Check(lambda value: value > low, f"more than {low:g}")


def within(low: float, high: float, *, closed: bool) -> Check:
    """Accepts numbers between `low`, exclusive, and `high`, which is inclusive if `closed`."""
    if closed:
        return Check(lambda value: low < value <= high, f"more than {low:g} and at most {high:g}")
    return Check(lambda value: low < value < high, f"more than {low:g} and less than {high:g}")


def between(low: float, high: float) -> Check:
    """Accepts numbers from `low` to `high`, both inclusive."""
    return Check(lambda value: low <= value <= high, f"from {low:g} to {high:g}")


def one_of(*names: str) -> Check:
    """Accepts any of `names`."""
    return Check(lambda value: value in names, f"one of {', '.join(names)}", names)


def one_of_or(prefix: str, *names: str) -> Check:
    """Accepts any of `names`, or a longer string that begins with `prefix`."""
    known = one_of(*names)
    return Check(
        lambda value: value in names or (value.startswith(prefix) and value != prefix),
        f"{known.right}, or {prefix}NAME",
        names,
    )


def some_of(*names: str) -> Check:
    """Accepts a tuple of some of `names`, each at most once."""
    return Check(
        lambda values: set(values) <= set(names) and len(set(values)) == len(values),
        f"some of {', '.join(names)}, each once",
        names,
    )


LOCAL = Check(
    lambda value: "://" not in value,
    "a path of this machine; mount what lies in a bucket as a folder, or copy it",
)
PREPARED = "tfds:"  # prefix of the name of a data set prepared by TFDS
COUNT = whole(1)
FRACTION = within(0, 1, closed=True)
SEED = Check(lambda value: 0 <= value < 2**32, "at least 0 and less than 2**32")


class Use(NamedTuple):
    """A condition on another setting, without which a setting has no effect.

    What a user's own code (a name ``package.module:object``) reads is not known, so the condition
    holds for it.

    Attributes:
        key: The other setting.
        values: Values of which it must have one; a string that ends in a colon stands for all
            values that begin with it.
        other: Whether it must instead have none of these values.
    """

    key: str
    values: tuple[Any, ...]
    other: bool = False

    def holds(self, config: Any) -> bool:
        """Returns whether the condition holds in a `fedhelp_jax.experiments.config.RunConfig`."""
        value = attrgetter(self.key)(config)
        if self.key.endswith(".name") and _is_own(value):
            return True
        prefixes = tuple(v for v in self.values if isinstance(v, str) and v.endswith(":"))
        found = value in self.values or (isinstance(value, str) and value.startswith(prefixes))
        return found != self.other

    def __str__(self) -> str:
        *rest, last = map(str, self.values)
        values = f"{', '.join(rest)} or {last}" if rest else last
        return (
            f"{self.key.replace('.settings.', '.')} {'other than' if self.other else '='} {values}"
        )


def _is_own(name: str) -> bool:
    return ":" in name and not name.startswith(PREPARED)


class Either(NamedTuple):
    """A condition that holds if at least one of several conditions holds."""

    uses: tuple[Use, ...]

    def holds(self, config: Any) -> bool:
        """Returns whether one of the conditions holds; see `Use.holds`."""
        return any(use.holds(config) for use in self.uses)

    def __str__(self) -> str:
        return " or ".join(map(str, self.uses))


def either(*uses: Use) -> Either:
    """Declares that a setting has an effect only if at least one of the conditions holds."""
    return Either(uses)


def where(key: str, *values: Any) -> Use:
    """Declares that a setting has an effect only if the setting `key` has one of `values`."""
    return Use(key, values)


def unless(key: str, *values: Any) -> Use:
    """Declares that a setting has an effect only if the setting `key` has none of `values`."""
    return Use(key, values, other=True)
