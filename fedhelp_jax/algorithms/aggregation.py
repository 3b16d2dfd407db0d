"""Servers that average, plainly or by an optimizer's step towards the mean."""

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
    """State of a server that averages: the variables it broadcasts, and its optimizer's state."""

    variables: Variables
    opt_state: OptState


def init_averaged(setup: Setup, variables: Variables) -> Averaged:
    """The state before the first round."""
    opt_state = () if setup.server_tx is None else setup.server_tx.init(variables["params"])
    return Averaged(variables, opt_state)


def average(
    setup: Setup, state: Averaged, uploads: Mapping[str, Upload], weights: Mapping[str, jax.Array]
) -> Averaged:
    """The weighted mean of all uploads, of whatever role, or the server optimizer's step to it.

    With ``setup.server_tx`` the averaged update is a gradient, ``g = w - mean`` (Reddi et al.,
    arXiv:2003.00295, algorithm 2, where its negative is called Delta); plain SGD of rate 1 is the
    mean. Batch statistics are averaged in any case.
    """
    mean = weighted_mean(list(uploads.values()), list(weights.values()))
    if setup.server_tx is None:
        return Averaged(mean, ())
    params = state.variables["params"]
    gradient = jax.tree.map(lambda p, m: p - m, params, mean["params"])
    updates, opt_state = setup.server_tx.update(gradient, state.opt_state, params)
    return Averaged({**mean, "params": optax.apply_updates(params, updates)}, opt_state)


def averaging(setup: Setup, clients: Mapping[str, ClientAlgorithm]) -> FederatedAlgorithm:
    """A method whose server broadcasts the small architecture and averages what comes back."""
    return FederatedAlgorithm(
        init=lambda run_key: init_averaged(setup, init_shared(setup, run_key)),
        download=lambda server_state, role: server_state.variables,
        clients=clients,
        aggregate=lambda state, uploads, weights, data: average(setup, state, uploads, weights),
        mean_only=True,
    )
