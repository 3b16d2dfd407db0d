"""Federated methods. One file each; adding one takes that file and a line in ``ALGORITHMS``."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedhelp_jax.algorithms.base import FederatedAlgorithm
from fedhelp_jax.algorithms.fedavg import FedAvgSettings, fedavg
from fedhelp_jax.algorithms.fedhelp import FedHelpSettings, fedhelp
from fedhelp_jax.algorithms.local import LocalSettings, local


class Method(NamedTuple):
    """A method by name: how to build it, its settings, and whether it learns from public data."""

    build: Callable[..., FederatedAlgorithm]
    settings: type[Any]
    uses_public: bool = False


ALGORITHMS: Mapping[str, Method] = {
    "fedhelp": Method(fedhelp, FedHelpSettings, uses_public=True),
    "fedavg": Method(fedavg, FedAvgSettings),
    "local": Method(local, LocalSettings),
}

SETTINGS: Mapping[str, type[Any]] = {name: m.settings for name, m in ALGORITHMS.items()}
