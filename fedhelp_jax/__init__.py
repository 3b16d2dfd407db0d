"""FedHelp in JAX: large hospitals and a foundation model help small ones, without sharing data.

A reimplementation of Wang et al., *Asymmetrical Reciprocity-based Federated Learning for Resolving
Disparities in Medical Diagnosis*, KDD 2025, arXiv:2412.19654.

Nothing is imported here, so that ``from fedhelp_jax import losses`` brings nothing else along.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedhelp_jax")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
