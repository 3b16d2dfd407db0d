"""Converts the values of settings from config files and the command line to their types."""

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.settings.checks import Check


def value_as(value: Any, kind: Any, check: Check | None, key: str) -> Any:
    """Returns `value` converted to the type `kind`.

    Args:
        value: Value from a config file or the command line.
        kind: int, float, bool, str, a tuple of one of them, or a union of one of these and None.
        check: Check that the value must pass.
        key: The setting's full name, for messages.

    Raises:
        UserError: The value has another type, or does not pass the check.
    """
    converted = _convert(value, kind)
    if converted is _WRONG:
        raise UserError(f"{key} = {value!r} must be {_kind_name(kind)}{_hint(value, check)}")
    if check is not None and converted is not None and not check.passes(converted):
        raise UserError(f"{key} = {value!r} must be {check.right}{_hint(value, check)}")
    return converted


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    """Checks that all keys are known.

    Raises:
        UserError: A key is unknown; the message prefixes it with `path`.
    """
    known = list(known)
    for key in values:
        if key not in known:
            raise UserError(f"{path}.{key} is not a setting{suggest(str(key), known)}")


def as_dict(values: Any, path: str) -> dict[str, Any]:
    """Returns settings by name as a dictionary.

    Raises:
        UserError: `values` is not a mapping; the message calls it `path`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} = {values!r} must hold settings by name")
    return dict(values)


_WRONG = object()
_FLOAT32_END = 2.0**128  # infinite in float32, in which programs compute


def _convert(value: Any, kind: Any) -> Any:
    """Returns `value` as a `kind`, or `_WRONG`. An int is a valid float; a bool is not a number."""
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        # The command line passes None as text for settings that hold text.
        if value is None or value == "None":
            return None if types.NoneType in kinds else _WRONG
        return _convert(value, next(k for k in kinds if k is not types.NoneType))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            return _WRONG
        items = tuple(_convert(item, typing.get_args(kind)[0]) for item in value)
        return _WRONG if any(item is _WRONG for item in items) else items
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # The comparison is False for NaN, infinity, and integers too large for a float.
        return float(value) if number and abs(value) < _FLOAT32_END else _WRONG
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _WRONG
    return value if isinstance(value, kind) else _WRONG


def _kind_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_kind_name(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a tuple, of each item " + _kind_name(typing.get_args(kind)[0])
    names = {bool: "True or False", str: "a string", int: "an integer"}
    return names.get(kind, "a finite number of 32 bits" if kind is float else "None")


def _hint(value: Any, check: Check | None) -> str:
    return suggest(value, check.choices) if check and isinstance(value, str) else ""
