"""Data flows one way: a module imports only from the lines above its own."""

import ast
from pathlib import Path

import pytest

import fedhelp_jax

LAYERS: tuple[str, ...] = (
    "typing",
    "core",
    "settings",
    "losses",
    "transforms",
    "metrics",
    "models",
    "tasks",
    "data",
    "algorithms",
    "simulation",
    "teachers",
    "report",
    "experiments",
    "cli",
)
PACKAGE = Path(fedhelp_jax.__file__).parent
FILES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))


def layer_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def ours_in(source: str, package: tuple[str, ...]) -> set[str]:
    """Returns the layers that a module imports anywhere in it, lazily too.

    `package` is the dotted name, in parts, of the package that the module stands in.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split("."))
            module = tuple(part for part in module if part)
            names = [(*module, alias.name) for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "fedhelp_jax" and len(name) > 1}
    return found - {"__version__"}


def test_the_reading_of_imports():
    source = """
import numpy.random
import fedhelp_jax.losses as l
from fedhelp_jax.core import tree
from fedhelp_jax import __version__
from . import types
from ..models.model import Model
def lazily():
    from fedhelp_jax.experiments.runner import train
"""
    package = ("fedhelp_jax", "data")
    assert ours_in(source, package) == {"losses", "core", "data", "models", "experiments"}


def test_every_module_has_a_layer():
    assert {layer_of(file) for file in FILES} - {"__init__"} <= set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_module_imports_only_from_above(file):
    imported = ours_in((PACKAGE / file).read_text(), ("fedhelp_jax", *file.parts[:-1]))
    if layer_of(file) == "__init__":
        allowed = set(LAYERS)  # the front door, which imports lazily
    else:
        allowed = set(LAYERS[: LAYERS.index(layer_of(file))])
        if len(file.parts) > 1:
            allowed.add(layer_of(file))  # within its own package
    assert imported <= allowed
