"""``fedhelp list``: what configs can name."""

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.data.sources import DATA, PUBLIC, source
from fedhelp_jax.metrics import METRICS
from fedhelp_jax.models.registry import MODELS, architecture
from fedhelp_jax.teachers.resolve import TEACHERS, teacher


def about(kind: str) -> list[tuple[str, str]]:
    """Returns names of a kind, and a line on each."""
    match kind:
        case "algorithms":
            return [(name, found.about) for name, found in ALGORITHMS.items()]
        case "models":
            return [(name, architecture(name, "").about) for name in MODELS]
        case "data" | "public":
            registry = DATA if kind == "data" else PUBLIC
            rows = [(name, source(registry, name, "").about) for name in registry]
            return [*rows, ("tfds:NAME", source(registry, "tfds:NAME", "").about)]
        case "teachers":
            return [(name, teacher(name).about) for name in TEACHERS]
        case _:
            return list(METRICS.items())
