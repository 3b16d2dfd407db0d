"""``fedhelp show`` and ``fedhelp list``."""

import sys
from pathlib import Path

from fedhelp_jax.cli.command import Command, Given
from fedhelp_jax.cli.process import printed
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.terminal import wrapped

_KINDS = ("algorithms", "models", "data", "public", "teachers", "metrics")


def _show(given: Given) -> int:
    if not given.rest:
        raise UserError(
            "no run folder is given; e.g. fedhelp show runs/demo/fedhelp runs/demo/local"
        )
    from fedhelp_jax.report import console

    console.show([Path(folder) for folder in given.rest])
    return printed()


def _list(given: Given) -> int:
    if len(given.rest) != 1 or given.rest[0] not in _KINDS:
        raise UserError(f"fedhelp list takes one of {', '.join(_KINDS)}")
    rows = _about(given.rest[0])
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(wrapped(f"{name:<{width}}  {text}", sys.stdout, width + 2))
    return printed()


def _about(kind: str) -> list[tuple[str, str]]:
    """Returns the names of a kind, with a line about each."""
    match kind:
        case "algorithms":
            from fedhelp_jax.algorithms import ALGORITHMS

            return [(name, found.about) for name, found in ALGORITHMS.items()]
        case "models":
            from fedhelp_jax.models.registry import MODELS, architecture

            return [(name, architecture(name, "").about) for name in MODELS]
        case "data" | "public":
            from fedhelp_jax.data.sources import DATA, PUBLIC, source

            registry = DATA if kind == "data" else PUBLIC
            rows = [(name, source(registry, name, "").about) for name in registry]
            return [*rows, ("tfds:NAME", source(registry, "tfds:NAME", "").about)]
        case "teachers":
            from fedhelp_jax.teachers.resolve import TEACHERS, teacher

            return [(name, teacher(name).about) for name in TEACHERS]
        case _:
            from fedhelp_jax.metrics import METRICS

            return list(METRICS.items())


SHOW = Command(
    "show",
    "print finished runs side by side",
    ("fedhelp show runs/demo/fedhelp runs/demo/local",),
    _show,
    arguments="FOLDER...",
)
LIST = Command(
    "list",
    "print what a config can name, and what each is",
    ("fedhelp list algorithms",),
    _list,
    arguments="|".join(_KINDS),
    more=(
        "package.module:object names one of your own (docs/extending.md); packages add theirs by "
        "entry points fedhelp_jax.algorithms and so on."
    ),
)
