"""FedHelp in JAX: large hospitals and a foundation model help small ones, without sharing data.

A reimplementation of Wang et al., *Asymmetrical Reciprocity-based Federated Learning for Resolving
Disparities in Medical Diagnosis*, KDD 2025, arXiv:2412.19654.

    import fedhelp_jax as fh

Everything here is imported when it is first used, so ``from fedhelp_jax import losses`` brings
nothing but JAX along.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import lazy_loader

try:
    __version__ = version("fedhelp_jax")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

__getattr__, __dir__, _names = lazy_loader.attach(
    __name__,
    submodules=[
        "algorithms",
        "data",
        "losses",
        "metrics",
        "models",
        "tasks",
        "teachers",
        "transforms",
    ],
    submod_attrs={
        "core.compilation": ["jit"],
        "core.errors": ["Failure", "UserError"],
        "experiments.config": ["default_config"],
        "experiments.config_files": ["load_config"],
        "experiments.result": ["Result", "load_run", "run"],
        "simulation.simulation": ["Simulation", "SimulationState"],
    },
)

if TYPE_CHECKING:
    from fedhelp_jax import (
        algorithms,
        data,
        losses,
        metrics,
        models,
        tasks,
        teachers,
        transforms,
    )
    from fedhelp_jax.core.compilation import jit
    from fedhelp_jax.core.errors import Failure, UserError
    from fedhelp_jax.experiments.config import default_config
    from fedhelp_jax.experiments.config_files import load_config
    from fedhelp_jax.experiments.result import Result, load_run, run
    from fedhelp_jax.simulation.simulation import Simulation, SimulationState

__all__ = [
    "Failure",
    "Result",
    "Simulation",
    "SimulationState",
    "UserError",
    "__version__",
    "algorithms",
    "data",
    "default_config",
    "jit",
    "load_config",
    "load_run",
    "losses",
    "metrics",
    "models",
    "run",
    "tasks",
    "teachers",
    "transforms",
]
