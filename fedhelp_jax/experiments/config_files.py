"""Reads settings and studies from the Python files that a command names, and applies its flags."""

import ast
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_dict, config_flags

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.experiments import config as config_lib
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.unused import refuse_unused

if TYPE_CHECKING:
    from fedhelp_jax.experiments.study import Study  # imports JAX and everything that computes


def refuse_rest(arguments: Sequence[str]) -> None:
    """Refuses arguments that remain on a command line after its flags are parsed."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is one argument too many; flags are --name=value")


def read_settings(source: str, overrides: list[str]) -> RunConfig:
    """Returns the checked settings of a config file, with ``--config.a.b=...`` applied."""
    return _changed(load_config(source), overrides)


# Typed as Any, because type checkers refuse `config.data.name = ...` on a ConfigDict.
def load_config(source: str) -> Any:
    """Returns the `ConfigDict` of a config file, ``file.py`` or ``file.py:argument``.

    Raises:
        UserError: The file cannot be read, or does not return a `ConfigDict`.
    """
    config = _call(source, "config")
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"{source}: get_config() must return fedhelp_jax.experiments.config.default_config(), "
            f"changed; it returned {type(config).__name__}"
        )
    return config


def load_run(path: Path, overrides: list[str]) -> RunConfig:
    """Returns the settings in a run's ``config.json``, with flags applied.

    Raises:
        UserError: A flag would make it a different run, or `fedhelp_jax.experiments.config.load`
            fails.
    """
    from fedhelp_jax.experiments.identity import differences  # imports everything that computes

    before = config_lib.load(path)
    if not overrides:
        return before
    after = _changed(config_lib.to_config_dict(before), overrides)
    others = differences(before, after)
    if others:
        raise UserError(
            f"{'; '.join(others)}: would be another run than that of {path}; only settings like "
            "--config.data.path, which say where data lie, may differ"
        )
    return after


def _changed(config: Any, overrides: list[str]) -> RunConfig:
    _declare_own(config, overrides)
    types = _types(config)
    _refuse_unknown_flags(overrides, types)
    values = flags.FlagValues()
    argv = ["fedhelp", *_with_tuples(overrides)]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        refuse_rest(values(argv)[1:])
    except flags.IllegalFlagValueError as error:
        flag = str(error).removeprefix("flag ").split(": ", 1)[0]
        kind = types[flag.removeprefix("--").split("=", 1)[0]]
        raise UserError(f"{flag} must be of type {kind.__name__}") from None
    except (flags.Error, TypeError, ValueError, KeyError, AttributeError) as error:
        # ml_collections does not wrap all of these errors; each is about an override.
        raise UserError(f"{' '.join(overrides)}: {error}") from None
    checked = config_lib.validate(config)
    names = [name if name in types else name.removeprefix("no") for name in _flag_names(overrides)]
    asked = [name.removeprefix("config.") for name in names]
    refuse_unused(checked, asked, by_method=False)
    return checked


def _declare_own(config: Any, overrides: Sequence[str]) -> None:
    """Declares the settings of a method from outside this package, so flags can change them."""
    flag = "--config.algorithm.name="
    named = [text.removeprefix(flag) for text in overrides if text.startswith(flag)]
    algorithm = config.get("algorithm")
    name = named[-1] if named else getattr(algorithm, "name", None)
    if algorithm is not None and isinstance(name, str) and ":" in name:
        config_lib.declare_method(config, name)


def load_study(source: str) -> "Study":
    """Returns the study of a study file, with its config files loaded."""
    from fedhelp_jax.experiments.study import Study

    study = _call(source, "study")
    if not isinstance(study, Study):
        raise UserError(
            f"{source}: get_study() must return a fedhelp_jax.experiments.study.Study; it returned "
            f"{type(study).__name__}"
        )
    beside = Path(source.split(":", 1)[0]).parent
    read = {
        name: _call(str(beside / value), "config") if isinstance(value, str) else value
        for name, value in study.datasets.items()
    }
    return replace(study, datasets=read)


def _call(source: str, what: str) -> Any:
    """Runs a file and returns the result of its ``get_<what>``; ``file.py:x`` passes it "x"."""
    path, *argument = source.split(":", 1)
    if not Path(path).is_file():
        raise UserError(f"--{what}={source}: there is no file {path}")
    loader = SourceFileLoader(f"fedhelp_{what}", path)
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    try:
        with _importing_from(Path(path).resolve().parent):
            sys.modules[loader.name] = module
            loader.exec_module(module)
            if not hasattr(module, f"get_{what}"):
                raise UserError(f"--{what}={source}: there is no get_{what}() in it")
            return vars(module)[f"get_{what}"](*argument)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--{what}={source}: raised {type(error).__name__}: {error}") from None


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Lets a file import modules from its own folder, as a script can.

    The modules are forgotten afterwards, so another folder's modules may have the same names.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).resolve().parent == folder:
                del sys.modules[name]


def _types(config: Any, prefix: str = "config.") -> dict[str, type]:
    """Returns the type of each setting in a `ConfigDict`, by the name of its flag."""
    types: dict[str, type] = {}
    for key in config:
        if hasattr(config[key], "keys"):
            types |= _types(config[key], f"{prefix}{key}.")
        else:
            types[prefix + key] = config.get_type(key)
    return types


def _refuse_unknown_flags(arguments: Sequence[str], keys: Iterable[str]) -> None:
    """Refuses a misspelt flag and suggests the closest known one, unlike ml_collections."""
    known = [f"--{key}" for key in keys]
    for name in _flag_names(arguments):
        # A leading "no" turns a switch off.
        if f"--{name}" not in known and f"--{name.removeprefix('no')}" not in known:
            raise UserError(f"--{name} is not a known flag{suggest(f'--{name}', known)}")


def _with_tuples(arguments: Sequence[str]) -> list[str]:
    """Returns flags in which lists of names, ``a,b`` or ``(a,b)``, are written as Python tuples.

    ml_collections would read such text as a single name, unless it is a number or a tuple already.
    """
    kinds = config_lib.kinds()
    changed = []
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if equals and kinds.get(flag.lstrip("-").removeprefix("config.")) == tuple[str, ...]:
            bare = text[1:-1] if text.startswith("(") and text.endswith(")") else text
            names = tuple(name.strip() for name in bare.split(",") if name.strip())
            argument = argument if _is_tuple(text) else f"{flag}={names!r}"
        changed.append(argument)
    return changed


def _is_tuple(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), tuple | list)
    except (ValueError, SyntaxError):
        return False


def _flag_names(arguments: Sequence[str]) -> list[str]:
    flagged = (a for a in arguments if a.startswith("-") and a != "--")
    return [argument.lstrip("-").split("=", 1)[0] for argument in flagged]
