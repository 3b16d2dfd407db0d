"""Looks up objects by name: built-in, from installed packages, or ``package.module:object``."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from fedhelp_jax.core.errors import UserError, suggest


class Registry(Mapping[str, Any]):
    """A mapping from names to objects of one kind.

    A package adds to a registry with an entry point in the group ``fedhelp_jax.<kind>``. Without an
    entry point, ``package.module:object`` names any object that can be imported. Such objects can
    be looked up, but iteration lists only built-in objects and entry points.
    """

    def __init__(
        self, kind: str, ours: Mapping[str, Any], check: Callable[[Any], str], also: str = ""
    ):
        """Starts with the objects of this package.

        Args:
          kind: The kind of objects, in the plural, such as "algorithms".
          ours: The built-in objects by name, or their locations as ``module:object``.
          check: Returns why an object is not of that kind, or an empty string if it is.
          also: Another value that is accepted in place of a name, for messages.
        """
        self.kind, self._ours, self._check, self._also = kind, dict(ours), check, also
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Returns the object of that name.

        Raises:
          KeyError: If there is no such name; `find` raises an error for users instead.
        """
        if name not in self._found:
            source = self._ours.get(name) or self._installed().get(name) or name
            if isinstance(source, str) and ":" not in source:
                raise KeyError(name)
            found = self._imported(source) if isinstance(source, str) else source
            lacking = self._check(found)
            if lacking:
                raise UserError(f"{source}: {lacking}")
            self._found[name] = found
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._ours, *self._installed()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (":" in name or name in iter(self))

    def find(self, name: str, key: str) -> Any:
        """Returns the object of a name that the setting `key` gives.

        Raises:
          UserError: If there is none, or it cannot be imported.
        """
        try:
            return self[name]
        except KeyError:
            known = ", ".join([*self, *([self._also] if self._also else [])])
            raise UserError(
                f"{key} = {name!r} must be one of {known}, or package.module:object"
                f"{suggest(name, list(self))}"
            ) from None
        except UserError as error:
            raise UserError(f"{key} = {error}") from None

    def _installed(self) -> dict[str, str]:
        group = f"fedhelp_jax.{self.kind}"
        return {point.name: point.value for point in entry_points(group=group)}

    def _imported(self, source: str) -> Any:
        module, _, name = source.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except AttributeError:
            raise UserError(f"{source}: module {module} has no {name}") from None
        except Exception as error:
            raise UserError(
                f"{source}: {module} cannot be imported ({type(error).__name__}: {error})"
            ) from error
        return found
