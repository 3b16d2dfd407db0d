"""Warns of settings that have no effect in a run, or refuses them.

The schema states for each setting what it needs to have an effect (`fedhelp_jax.settings.schema`),
and each method states which settings it ignores (`fedhelp_jax.algorithms.Method.ignores`).
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments.config import RunConfig, flat, to_dict
from fedhelp_jax.settings.checks import Either, Use

_log = logging.getLogger(__name__)


def needed_for(config: RunConfig, key: str, *, by_method: bool = True) -> str:
    """Returns the condition for a setting to have an effect; an empty string if it has one.

    Args:
        config: The settings of a run.
        key: The setting.
        by_method: Whether the chosen method counts, or only the other settings do.

    Example:
        >>> needed_for(RunConfig(), "data.shards_per_client")
        'data.split_by = shards'
    """
    *_, uses = _found(config, key)
    missing = [str(use) for use in uses if not use.holds(config)]
    if not missing and by_method and ALGORITHMS[config.algorithm.name].ignores(key):
        missing = [f"methods other than {config.algorithm.name}"]
    return " and ".join(missing)


def unused(config: RunConfig, keys: Iterable[str], *, by_method: bool) -> Iterator[str]:
    """Yields a message for each setting that has no effect and is not at its default.

    Args:
        config: The settings of a run.
        keys: The settings to check.
        by_method: See `needed_for`.
    """
    for key in keys:
        value, default, _ = _found(config, key)
        needed = needed_for(config, key, by_method=by_method)
        if needed and value != default:
            yield f"config.{key} changes nothing in this run: it is for {needed}"


def warn_unused(config: RunConfig) -> None:
    """Warns of settings that have no effect whatever the method is."""
    keys = [key.replace(".settings.", ".") for key, _ in flat(to_dict(config))]
    for line in unused(config, keys, by_method=False):
        _log.warning("%s", line)


def refuse_unused(config: RunConfig, keys: Iterable[str], *, by_method: bool) -> None:
    """Checks that the settings a command asks for have an effect; see `unused` for the arguments.

    A config file is a base for many runs, some of which may not use all of its settings. A setting
    from a flag, a sweep or a study is meant for that particular run.

    Raises:
        UserError: A setting has no effect in the run. The message says what it is for.
    """
    for line in unused(config, keys, by_method=by_method):
        raise UserError(line)


def _found(config: RunConfig, key: str) -> tuple[Any, Any, tuple[Use | Either, ...]]:
    """Returns a setting's value, its default, and the conditions for it to have an effect."""
    owner, last = key.rpartition(".")[::2]
    if owner == "algorithm" and last != "name":
        owner = "algorithm.settings"
    parent, uses = config, ()
    if owner == "algorithm.settings":
        parent = config.algorithm.settings
    elif owner:
        for name in owner.split("."):
            uses += next(f for f in dataclasses.fields(parent) if f.name == name).metadata["only"]
            parent = getattr(parent, name)
    field = next(f for f in dataclasses.fields(parent) if f.name == last)
    return getattr(parent, last), field.default, (*uses, *field.metadata["only"])
