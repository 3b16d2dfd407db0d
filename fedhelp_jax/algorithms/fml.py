"""FML, federated mutual learning.

Shen et al., "Federated Mutual Learning", arXiv:2006.16765, sec. 3.2 (deep mutual learning: Zhang et
al., arXiv:1706.00384). Every client has its own network W_i, of its own architecture, and a copy
v_i of the shared one (the "meme"). Both learn from the same batch at once:

    W_i:  alpha CE(W_i(x), y) + (1 - alpha) KL( v_i(x) || W_i(x) )
    v_i:  beta  CE(v_i(x), y) + (1 - beta)  KL( W_i(x) || v_i(x) )

Each treats the other's output as constant. The server averages the v_i; a client keeps and deploys
its W_i.

Notes: ``alpha = beta = 1`` turns distillation off, which leaves local training, and FedAvg of the
memes.
"""

import dataclasses
from typing import Any

import jax

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import ClientAlgorithm, FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.client import Batch, Info, Updated, gradient_step
from fedhelp_jax.algorithms.local_training import local_epochs, private_client, supervised_loss
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.losses import masked_mean
from fedhelp_jax.models.model import Model, Variables, apply_model
from fedhelp_jax.settings import between, setting
from fedhelp_jax.typing import Carry, OptState, PyTree


@dataclasses.dataclass(frozen=True)
class FMLSettings:
    """Settings of FML."""

    alpha: float = setting(
        0.5,
        "share of the labels in the loss of a client's own network; 1 turns distillation off",
        between(0, 1),
    )
    beta: float = setting(0.5, "the same of the shared network", between(0, 1))


@method(FMLSettings)
def fml(setup: Setup, settings: FMLSettings) -> FederatedAlgorithm:
    """FML: mutual distillation of each client's model and a shared one."""
    meme = setup.models["small"]

    def client(role: str) -> ClientAlgorithm:
        own = setup.models[role]

        def update(
            key: jax.Array, download: Variables, state: Variables, data: ClientData
        ) -> Updated:
            def step(carry: Carry, batch: Batch, _: jax.Array) -> tuple[Carry, Info]:
                (w, w_opt), (v, v_opt) = carry
                w_logits = training_logits(own, w, batch)
                v_logits = training_logits(meme, v, batch)
                (w, w_opt), loss = learn(own, w, w_opt, batch, v_logits, settings.alpha)
                (v, v_opt), meme_loss = learn(meme, v, v_opt, batch, w_logits, settings.beta)
                return ((w, w_opt), (v, v_opt)), {"loss": loss, "meme_loss": meme_loss}

            start = tuple((v, setup.tx.init(v["params"])) for v in (state, download))
            ((w, _), (v, _)), info = local_epochs(setup, key, step, start, data)
            return w, v, info

        return private_client(setup, role, update, broadcast=True)

    def learn(
        model: Model,
        variables: Variables,
        opt_state: OptState,
        batch: Batch,
        teacher: Any,
        share: float,
    ) -> PyTree:
        supervised = supervised_loss(setup, model, variables["batch_stats"], batch)

        def loss_fn(params: Variables) -> tuple[jax.Array, Variables]:
            loss, (logits, stats) = supervised(params)
            mutual = setup.task.distill(logits, teacher, temperature=1.0, where=batch.mask)
            return share * loss + (1 - share) * masked_mean(mutual, batch.mask), stats

        params, opt_state, loss, stats = gradient_step(
            setup.tx, loss_fn, variables["params"], opt_state
        )
        return ({"params": params, "batch_stats": stats}, opt_state), loss

    return averaging(setup, {role: client(role) for role in ROLES})


def training_logits(model: Model, variables: Variables, batch: Batch) -> jax.Array:
    """Returns a network's logits on a batch in training mode, as its own loss sees them."""
    return apply_model(model, variables, batch.images, train=True, mask=batch.mask)[0]
