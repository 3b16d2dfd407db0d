"""Settings that change nothing in a run, told or refused.

What a setting needs to have an effect stands beside it (`fedhelp_jax.settings.schema`), and beside
each method what it ignores (`fedhelp_jax.algorithms.Method.ignores`).
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
    """Returns what would have to hold for a setting to have an effect; nothing where it has one.

    Args:
        config: The settings of a run.
        key: The setting.
        by_method: Whether the chosen method counts, or only the other settings.

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
    """Gives a line for each of some settings that is not at its default and changes nothing.

    Args:
        config: The settings of a run.
        keys: Which of them are meant.
        by_method: As of `needed_for`.
    """
    for key in keys:
        value, default, _ = _found(config, key)
        needed = needed_for(config, key, by_method=by_method)
        if needed and value != default:
            yield f"config.{key} changes nothing in this run: it is for {needed}"


def warn_unused(config: RunConfig) -> None:
    """Warns of settings, of the config file say, that change nothing, whatever the method."""
    keys = [key.replace(".settings.", ".") for key, _ in flat(to_dict(config))]
    for line in unused(config, keys, by_method=False):
        _log.warning("%s", line)


def refuse_unused(config: RunConfig, keys: Iterable[str], *, by_method: bool) -> None:
    """Checks that settings that a command asks for have an effect; for arguments see `unused`.

    A config file is a base of many runs, some of which may not use all that it sets. What a flag, a
    sweep or a study asks for is meant for that run.

    Raises:
        UserError: One of them changes nothing in the run. The message says what it is for.
    """
    for line in unused(config, keys, by_method=by_method):
        raise UserError(line)


def _found(config: RunConfig, key: str) -> tuple[Any, Any, tuple[Use | Either, ...]]:
    """Returns a setting's value and default, and what must hold for it to have an effect."""
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
