"""FedBN.

Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021,
arXiv:2102.07623, algorithm 1. This is FedAvg, except that normalisation layers, parameters as well
as running statistics, stay with their client and are neither sent nor averaged.

Notes: a client deploys the averaged layers with its own normalisation (``personal``). Normalisation
layers are recognised by their path: one of its parts contains "norm", or is "bn", optionally with a
number or after an underscore. This covers all networks here, including their shortcuts, and Flax's
own layers. On a network without normalisation layers, this is FedAvg.
"""

import dataclasses
import re

import jax

from fedhelp_jax.algorithms.aggregation import averaging, init_averaged
from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    Setup,
    init_shared,
)
from fedhelp_jax.algorithms.client import Updated
from fedhelp_jax.algorithms.local_training import train_locally
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.core.tree import merge, select
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables

_NORMALISATION = re.compile(r".*norm.*|(.*_)?bn\d*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class FedBNSettings:
    """FedBN has no settings of its own."""


@method(FedBNSettings, unused=LARGE_NETWORK)
def fedbn(setup: Setup, settings: FedBNSettings) -> FederatedAlgorithm:
    """FedBN: FedAvg in which normalisation layers stay with their client."""
    del settings
    model = setup.models["small"]

    def update(key: jax.Array, shared: Variables, own: Variables, data: ClientData) -> Updated:
        variables, info = train_locally(setup, model, key, merge(shared, own), data)
        own, shared = split(variables)
        return own, shared, info

    client = ClientAlgorithm(
        models={"personal": model},
        init=lambda run_key, client_id: split(init_shared(setup, run_key))[0],
        update=update,
        deploy=lambda shared, own, data: {"personal": merge(shared, own)},
    )
    return averaging(setup, dict.fromkeys(ROLES, client))._replace(
        init=lambda run_key: init_averaged(setup, split(init_shared(setup, run_key))[1])
    )


def split(variables: Variables) -> tuple[Variables, Variables]:
    """Splits variables into a client's own and the shared ones, with None for missing leaves."""
    own = select(variables, is_normalisation)
    return own, select(variables, lambda path: not is_normalisation(path))


def is_normalisation(path: tuple[str, ...]) -> bool:
    """Returns whether the variable at a path belongs to a normalisation layer."""
    return path[0] == "batch_stats" or any(_NORMALISATION.fullmatch(part) for part in path)
