"""Per-FedAvg, first order.

Fallah et al., "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach", NeurIPS 2020, arXiv:2002.07948, algorithm 1 with approximation FO. Clients
look for a ``w`` from which one step on their own data gives a good model:

    per step:  u <- w - alpha grad F_i(w; D),   w <- w - beta grad F_i(u; D')
    server:    w <- mean_i w_i
    deployed:  w - alpha grad F_i(w; all of client i's training data)

Notes: the optimizer is plain SGD, with ``alpha = beta = setup.learning_rate``. D and D' are the
halves of a batch; D is the larger one if they differ. A batch of one example trains nothing. Batch
statistics are updated on D'. The step at deployment normalises by batches and keeps the broadcast
statistics. Weight decay is applied at w, as in an optimizer.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    Setup,
    init_shared,
)
from fedhelp_jax.algorithms.client import Batch, Info, Updated, apply_gradient
from fedhelp_jax.algorithms.local_training import local_epochs, one_pass, supervised_loss
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.typing import Carry, Params


@dataclasses.dataclass(frozen=True)
class PerFedAvgSettings:
    """Per-FedAvg has no settings of its own."""


@method(PerFedAvgSettings, plain_sgd=True, unused=LARGE_NETWORK)
def per_fedavg(setup: Setup, settings: PerFedAvgSettings) -> FederatedAlgorithm:
    """Per-FedAvg: a global model that adapts to a client in one step."""
    del settings
    model = setup.models["small"]

    def update(key: jax.Array, w: Variables, state: Variables, data: ClientData) -> Updated:
        del state

        def step(w: Variables, batch: Batch, _: jax.Array) -> tuple[Variables, Info]:
            count = jnp.sum(batch.mask)
            first = jnp.arange(len(batch.mask)) < (count + 1) // 2
            inner = supervised_loss(
                setup, model, w["batch_stats"], batch._replace(mask=batch.mask & first)
            )
            (loss, _), gradient = jax.value_and_grad(inner, has_aux=True)(w["params"])
            outer = supervised_loss(
                setup, model, w["batch_stats"], batch._replace(mask=batch.mask & ~first)
            )
            gradient, (_, stats) = jax.grad(outer, has_aux=True)(
                apply_gradient(setup.sgd, w["params"], gradient)
            )
            # A batch of one example has no D'; do not step on weight decay alone.
            params = jax.tree.map(
                lambda new, old: jnp.where(count > 1, new, old),
                apply_gradient(setup.sgd, w["params"], gradient),
                w["params"],
            )
            return {"params": params, "batch_stats": stats}, {"loss": loss}

        w, info = local_epochs(setup, key, step, w, data)
        return w, w, info

    def deploy(w: Variables, state: Variables, data: ClientData) -> dict[str, Variables]:
        del state
        gradient = mean_gradient(setup, model, w, data)
        adapted = apply_gradient(setup.sgd, w["params"], gradient)
        return {"personal": {**w, "params": adapted}, "global": w}

    client = ClientAlgorithm(
        models={"personal": model, "global": model},
        init=lambda run_key, client_id: init_shared(setup, run_key),
        update=update,
        deploy=deploy,
        adapts=True,
    )
    return averaging(setup, dict.fromkeys(ROLES, client))


def mean_gradient(setup: Setup, model: Model, variables: Variables, data: ClientData) -> Params:
    """Returns the gradient of the mean loss over a client's training data; 0 without any."""
    params, stats = variables["params"], variables["batch_stats"]

    def step(total: Carry, batch: Batch, _: jax.Array) -> tuple[Carry, Info]:
        loss_fn = supervised_loss(setup, model, stats, batch)
        (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        share = jnp.sum(batch.mask) / data.size
        return jax.tree.map(lambda t, g: t + share * g, total, gradient), {"loss": loss}

    # The order is the same in every round, so that the deployed network depends on nothing else.
    total, _ = one_pass(setup, step, jax.tree.map(jnp.zeros_like, params), data)
    return total
