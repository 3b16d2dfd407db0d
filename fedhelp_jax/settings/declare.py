"""How a setting is declared: as a field of a dataclass, with its help and its check."""

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
    """Returns a dataclass field.

    Args:
        default: Its default.
        about: Its help.
        check: What it must pass; None is never given to the check.
        only: What must hold for it to have an effect; a setting that has none is refused where a
            command asks for it (`fedhelp_jax.experiments.unused.refuse_unused`).
        identity: Whether another value makes another run. It does not where a setting says where
            data lie (their content is compared instead), how fast a teacher is asked, or how
            clients are spread over devices.
    """
    only = (only,) if isinstance(only, Use | Either) else only
    metadata = {"about": about, "check": check, "only": only, "identity": identity}
    return dataclasses.field(default=default, metadata=metadata)


def part(cls: type, *, only: Use | None = None) -> Any:
    """Returns a dataclass field that holds settings of its own; ``only`` is for each of them."""
    return dataclasses.field(default_factory=cls, metadata={"only": (only,) if only else ()})
