"""What a run came to, as plain numbers: for ``clients.csv`` and ``summary.json``."""

import math
from collections.abc import Mapping, Sequence
from importlib import metadata

from fedhelp_jax.typing import JsonObject, Record

# {role: {model: {metric: one value per client}}}, as a simulation evaluates; any kind of array.
Results = Mapping[str, Mapping[str, Record]]

_PACKAGES = ("fedhelp_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def group_summary(values: Record) -> dict[str, float]:
    """Means of one metric by role, the worst small client, and the gap between the roles.

    Args:
      values: Per role, one value per client; NaN where a client has none, which then counts
        nowhere.

    Returns:
      ``small_mean``, ``large_mean``, ``worst_small`` and ``gap = large_mean - small_mean``; NaN
      where no client has a value.

    Example:
      >>> group_summary({"small": [0.25, 0.75], "large": [1.0]})
      {'small_mean': 0.5, 'large_mean': 1.0, 'worst_small': 0.25, 'gap': 0.5}
    """
    small = [float(v) for v in values.get("small", ()) if not math.isnan(v)]
    large = [float(v) for v in values.get("large", ()) if not math.isnan(v)]
    small_mean, large_mean = _mean(small), _mean(large)
    return {
        "small_mean": small_mean,
        "large_mean": large_mean,
        "worst_small": min(small, default=math.nan),
        "gap": large_mean - small_mean,
    }


def headline(results: Results, metric: str) -> JsonObject:
    """The named metric of each role's first model, which is the one it deploys."""
    return {role: next(iter(models.values()))[metric] for role, models in results.items()}


def client_rows(
    names: Mapping[str, Sequence[str]], results: Mapping[str, Results]
) -> list[JsonObject]:
    """Rows of ``clients.csv``, one per client, model, split and metric.

    Args:
      names: Per role, its clients.
      results: Per split, what the evaluation gave.
    """
    return [
        {
            "client": client,
            "role": role,
            "model": model,
            "split": split,
            "metric": metric,
            "value": float(values[i]),
        }
        for split, by_role in results.items()
        for role, models in by_role.items()
        for i, client in enumerate(names[role])
        for model, metrics in models.items()
        for metric, values in metrics.items()
    ]


def per_client(
    names: Mapping[str, Sequence[str]],
    sizes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    results: Results,
    diverged: Mapping[str, Sequence[str]],
) -> list[JsonObject]:
    """One entry per client with the test metrics of the model it deploys.

    Args:
      names: Per role, its clients.
      sizes: Per role, training and test examples of each client.
      results: What the evaluation on test gave.
      diverged: Per role, which of them have diverged.
    """
    return [
        {
            "name": client,
            "role": role,
            "model": next(iter(models)),
            "n_train": int(sizes[role][0][i]),
            "n_test": int(sizes[role][1][i]),
            "diverged": client in diverged[role],
            "metrics": {
                metric: float(values[i]) for metric, values in next(iter(models.values())).items()
            },
        }
        for role, models in results.items()
        for i, client in enumerate(names[role])
    ]


def has_diverged(summary: Record) -> bool:
    """Whether every client of a role has, by a ``summary.json``: the run then has no result."""
    clients = summary.get("per_client") or []
    roles = {client["role"] for client in clients}
    return any(
        all(client.get("diverged", False) for client in clients if client["role"] == role)
        for role in roles
    )


def mean_of_roles(summary: Record) -> float:
    """The mean of both roles' means, by a ``summary.json``; NaN of none, and of a diverged run."""
    found = [summary[key] for key in ("small_mean", "large_mean") if summary[key] is not None]
    return math.nan if has_diverged(summary) else _mean(found)


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    return {name: metadata.version(name) for name in _PACKAGES}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
