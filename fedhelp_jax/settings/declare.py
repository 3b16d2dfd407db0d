"""Declares settings as fields of dataclasses, with their help and checks."""

import dataclasses
from typing import Any

from fedhelp_jax.settings.checks import Check, Either, Use


def setting(
    default: Any,
    about: str,
    check: Check | None = None,
    *,
    only: Use | Either | tuple[Use | Either, ...] = (),
    identity: bool = True,
) -> Any:
    """Returns a dataclass field that declares a setting.

    Args:
        default: Default value.
        about: Help text.
        check: Check that the value must pass; the value None is never checked.
        only: Conditions under which the setting has an effect. If they do not hold, commands that
            call `fedhelp_jax.experiments.unused.refuse_unused` reject the setting.
        identity: Whether runs with different values are different runs. This is False for settings
            that say where data are (their content is compared instead), how fast a teacher is
            queried, or how clients are mapped to devices.
    """
    only = (only,) if isinstance(only, Use | Either) else only
    metadata = {"about": about, "check": check, "only": only, "identity": identity}
    return dataclasses.field(default=default, metadata=metadata)


def part(cls: type, *, only: Use | None = None) -> Any:
    """Returns a dataclass field for a group of settings; ``only`` applies to each of them."""
    return dataclasses.field(default_factory=cls, metadata={"only": (only,) if only else ()})
