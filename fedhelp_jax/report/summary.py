"""The results of a run as plain numbers, for ``clients.csv`` and ``summary.json``."""

import math
from collections.abc import Mapping, Sequence
from importlib import metadata

from fedhelp_jax.typing import JsonObject, Record

# {role: {model: {metric: one value per client}}}, as evaluated by a simulation; any kind of array.
Results = Mapping[str, Mapping[str, Record]]

# Said wherever results of synthetic data are shown.
SYNTHETIC = (
    "Synthetic data: made by a procedure. This shows that methods run, not what they do for "
    "patients."
)

_PACKAGES = ("fedhelp_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def group_summary(values: Record) -> dict[str, float]:
    """Returns the mean of a metric by role, the worst small client, and the gap between the roles.

    Args:
      values: Per role, one value per client; clients whose value is NaN are ignored.

    Returns:
      ``small_mean``, ``large_mean``, ``worst_small`` and ``gap = large_mean - small_mean``; NaN
      if no client has a value.

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
    """Returns the named metric of each role's first model, which is the one that it deploys."""
    return {role: next(iter(models.values()))[metric] for role, models in results.items()}


def client_rows(
    names: Mapping[str, Sequence[str]], results: Mapping[str, Results]
) -> list[JsonObject]:
    """Returns the rows of ``clients.csv``, one per client, model, split and metric.

    Args:
      names: The clients of each role.
      results: The results of the evaluation on each split.
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
    """Returns one entry per client, with the test metrics of the model that it deploys.

    Args:
      names: The clients of each role.
      sizes: For each role, the number of training and test examples of each client.
      results: The results of the evaluation on the test split.
      diverged: The diverged clients of each role.
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
    """Returns whether, by its ``summary.json``, a run has diverged and thus has no result.

    It has diverged if every client of a role has.
    """
    clients = summary.get("per_client") or []
    roles = {client["role"] for client in clients}
    return any(
        all(client.get("diverged", False) for client in clients if client["role"] == role)
        for role in roles
    )


def mean_of_roles(summary: Record) -> float:
    """Returns the mean of the roles' means in a ``summary.json``.

    The result is NaN if there are none, or if the run has diverged.
    """
    found = [summary[key] for key in ("small_mean", "large_mean") if summary[key] is not None]
    return math.nan if has_diverged(summary) else _mean(found)


def versions() -> dict[str, str]:
    """Returns the versions of the packages that computed the numbers."""
    return {name: metadata.version(name) for name in _PACKAGES}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
