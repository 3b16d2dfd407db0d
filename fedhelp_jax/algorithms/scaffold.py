"""SCAFFOLD.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv:1910.06378, algorithm 1, option II. The server keeps ``x`` and a control variate ``c``; a
client keeps ``c_i``.

    y <- x;  K times:  y <- y - eta (grad F_i(y) - c_i + c)
    c_i' <- c_i - c + (x - y) / (K eta)
    x <- x + mean_i (y - x),   c <- c + sum_i (c_i' - c_i) / N

The mean and the sum run over the clients of the round; N counts all clients.

Notes: the optimizer is plain SGD with rate ``setup.learning_rate``. Clients are weighted equally,
whatever ``client_weights`` is. The server's learning rate is 1; ``setup.server_tx`` sets another. A
client without data changes nothing. Batch statistics are averaged.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedhelp_jax.algorithms.aggregation import Averaged, average, init_averaged
from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    ServerData,
    Setup,
    init_shared,
)
from fedhelp_jax.algorithms.client import Updated
from fedhelp_jax.algorithms.local_training import train_locally
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.core.tree import weighted_mean
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.typing import Params, Upload


@dataclasses.dataclass(frozen=True)
class ScaffoldSettings:
    """SCAFFOLD has no settings of its own."""


class Controlled(NamedTuple):
    """Variables ``x`` (or ``y``) and a control variate ``c`` (or ``c_i``) of the parameters."""

    variables: Variables
    control: Params


class Server(NamedTuple):
    """The server's ``x`` with its optimizer state, and ``c``."""

    averaged: Averaged
    control: Params


@method(ScaffoldSettings, plain_sgd=True, unused=("client_weights", *LARGE_NETWORK))
def scaffold(setup: Setup, settings: ScaffoldSettings) -> FederatedAlgorithm:
    """SCAFFOLD: FedAvg with control variates that correct client drift."""
    del settings
    model, eta = setup.models["small"], setup.learning_rate

    def init_client(run_key: jax.Array, client_id: jax.Array) -> Controlled:
        del client_id
        variables = init_shared(setup, run_key)
        return Controlled(variables, jax.tree.map(jnp.zeros_like, variables["params"]))

    def init(run_key: jax.Array) -> Server:
        variables, control = init_client(run_key, jnp.int32(0))
        return Server(init_averaged(setup, variables), control)

    def update(
        key: jax.Array, download: Controlled, state: Controlled, data: ClientData
    ) -> Updated:
        x, c, c_i = download.variables, download.control, state.control

        def corrected(gradient: Params, params: Params) -> Params:
            del params
            return jax.tree.map(lambda g, mine, all: g - mine + all, gradient, c_i, c)

        tx = optax.chain(optax.stateless(corrected), setup.sgd)
        y, info = train_locally(setup, model, key, x, data, tx=tx)
        steps = setup.local_epochs * -(-data.size // setup.batch_size)
        scale = jnp.where(steps > 0, 1 / (jnp.maximum(steps, 1) * eta), 0)

        def new_control(mine: jax.Array, all: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.where(steps > 0, mine - all + scale * (x - y), mine)

        control = jax.tree.map(new_control, c_i, c, x["params"], y["params"])
        change = jax.tree.map(jnp.subtract, control, c_i)
        return Controlled(y, control), Controlled(y, change), info

    def aggregate(
        state: Server,
        uploads: Mapping[str, Upload],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> Server:
        present = {role: (w > 0).astype(float) for role, w in weights.items()}
        models = {role: upload.variables for role, upload in uploads.items()}
        change = weighted_mean([u.control for u in uploads.values()], list(present.values()))
        share = sum(jnp.sum(p) for p in present.values()) / data.num_clients
        control = jax.tree.map(lambda c, mean: c + share * mean, state.control, change)
        return Server(average(setup, state.averaged, models, present), control)

    client = ClientAlgorithm(
        models={"global": model, "personal": model},
        init=init_client,
        update=update,
        deploy=lambda download, state, data: {
            "global": download.variables,
            "personal": state.variables,
        },
    )
    return FederatedAlgorithm(
        init=init,
        download=lambda state, role: Controlled(state.averaged.variables, state.control),
        clients=dict.fromkeys(ROLES, client),
        aggregate=aggregate,
    )
