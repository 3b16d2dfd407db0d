"""pFedMe.

Dinh et al., "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020,
arXiv:2006.08848, algorithm 1. Every client keeps a personal ``theta_i`` near its local ``w_i``:

    per batch:  K times:  theta <- theta - rate (grad F_i(theta) + lambda (theta - w_i))
                w_i <- w_i - eta lambda (w_i - theta)
    server:     w <- (1 - beta) w + beta mean_i w_i

A client deploys its ``theta_i`` (``personal``).

Notes: the optimizer is plain SGD, with ``rate = eta = setup.learning_rate``. theta starts each
round from the broadcast ``w`` and continues from batch to batch. ``beta = 1``; for another value,
set ``setup.server_tx`` to plain SGD with that learning rate. Batch statistics are those of theta.
``lam = 0`` leaves ``w`` unchanged, so that no parameters are shared.
"""

import dataclasses

import jax
import optax

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.client import Batch, Info, Updated, apply_gradient
from fedhelp_jax.algorithms.local_training import (
    local_epochs,
    personal_client,
    proximal,
    supervised_loss,
)
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import COUNT, at_least, setting
from fedhelp_jax.typing import Carry


@dataclasses.dataclass(frozen=True)
class PFedMeSettings:
    """Settings of pFedMe."""

    lam: float = setting(
        15.0, "weight of the distance between personal and local model (lambda)", at_least(0)
    )
    prox_steps: int = setting(5, "steps of the personal model on each batch (K)", COUNT)


@method(PFedMeSettings, plain_sgd=True, unused=LARGE_NETWORK)
def pfedme(setup: Setup, settings: PFedMeSettings) -> FederatedAlgorithm:
    """Personal models as Moreau envelopes of the global one (pFedMe)."""
    model = setup.models["small"]

    def update(key: jax.Array, download: Variables, state: Variables, data: ClientData) -> Updated:
        del state

        def step(carry: Carry, batch: Batch, _: jax.Array) -> tuple[Carry, Info]:
            w, start = carry
            tx = optax.chain(proximal(settings.lam, w), setup.sgd)

            def prox_step(_: jax.Array, theta: Variables) -> Variables:
                loss_fn = supervised_loss(setup, model, theta["batch_stats"], batch)
                gradient, (_, stats) = jax.grad(loss_fn, has_aux=True)(theta["params"])
                params = apply_gradient(tx, theta["params"], gradient)
                return {"params": params, "batch_stats": stats}

            loss = supervised_loss(setup, model, start["batch_stats"], batch)(start["params"])[0]
            theta = jax.lax.fori_loop(0, settings.prox_steps, prox_step, start)
            rate = setup.learning_rate * settings.lam
            w = jax.tree.map(lambda w, t: w - rate * (w - t), w, theta["params"])
            return (w, theta), {"loss": loss}

        (w, theta), info = local_epochs(setup, key, step, (download["params"], download), data)
        return theta, {**theta, "params": w}, info

    return averaging(setup, dict.fromkeys(ROLES, personal_client(setup, update)))
