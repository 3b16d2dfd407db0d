"""Provides servers that average uploads, or take an optimizer's step towards their mean."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import optax

from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    Setup,
    init_shared,
)
from fedhelp_jax.core.tree import weighted_mean
from fedhelp_jax.models.model import Variables
from fedhelp_jax.typing import OptState, Upload


class Averaged(NamedTuple):
    """The state of a server that averages: the variables it broadcasts, and its optimizer state."""

    variables: Variables
    opt_state: OptState


def init_averaged(setup: Setup, variables: Variables) -> Averaged:
    """Returns the state before the first round."""
    opt_state = () if setup.server_tx is None else setup.server_tx.init(variables["params"])
    return Averaged(variables, opt_state)


def average(
    setup: Setup, state: Averaged, uploads: Mapping[str, Upload], weights: Mapping[str, jax.Array]
) -> Averaged:
    """Returns the weighted mean of the uploads of all roles, or an optimizer's step towards it.

    With ``setup.server_tx``, the averaged update is taken as a gradient, ``g = w - mean`` (Reddi et
    al., arXiv:2003.00295, algorithm 2, where its negative is called Delta). Plain SGD with a
    learning rate of 1 gives the mean. Batch statistics are always averaged.
    """
    mean = weighted_mean(list(uploads.values()), list(weights.values()))
    if setup.server_tx is None:
        return Averaged(mean, ())
    params = state.variables["params"]
    gradient = jax.tree.map(lambda p, m: p - m, params, mean["params"])
    updates, opt_state = setup.server_tx.update(gradient, state.opt_state, params)
    return Averaged({**mean, "params": optax.apply_updates(params, updates)}, opt_state)


def averaging(setup: Setup, clients: Mapping[str, ClientAlgorithm]) -> FederatedAlgorithm:
    """Returns a method whose server broadcasts the small architecture and averages the uploads."""
    return FederatedAlgorithm(
        init=lambda run_key: init_averaged(setup, init_shared(setup, run_key)),
        download=lambda server_state, role: server_state.variables,
        clients=clients,
        aggregate=lambda state, uploads, weights, data: average(setup, state, uploads, weights),
        mean_only=True,
    )
