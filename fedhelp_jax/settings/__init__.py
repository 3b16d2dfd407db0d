"""Declares settings: their type, default, help and check, and the conditions for an effect.

Example::

    @dataclasses.dataclass(frozen=True)
    class FedClipSettings:
        clip_norm: float = setting(1.0, "longest update, in the Euclidean norm", more_than(0))
"""

from fedhelp_jax.settings.checks import (
    COUNT,
    FRACTION,
    LOCAL,
    SEED,
    Check,
    at_least,
    between,
    either,
    more_than,
    one_of,
    some_of,
    unless,
    where,
    whole,
    within,
)
from fedhelp_jax.settings.declare import part, setting

__all__ = [
    "COUNT",
    "FRACTION",
    "LOCAL",
    "SEED",
    "Check",
    "at_least",
    "between",
    "either",
    "more_than",
    "one_of",
    "part",
    "setting",
    "some_of",
    "unless",
    "where",
    "whole",
    "within",
]
