"""FedDF.

Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020,
arXiv:2006.07242, algorithm 3 (several architectures). Every client trains the model it receives, of
its role's architecture. For each architecture, the server computes

    w_role <- mean of the role's uploads
    server_steps times, on public batches x_p:
        w_role <- step on KL( sigma(mean_i f_i(x_p)) || sigma(f_role(x_p)) )

where f_i are all uploads, of every architecture. Clients deploy the distilled model (``global``);
their copies after local training are also reported (``personal``).

Notes: the paper distils for up to 10,000 steps of Adam, with early stopping on a validation set
that the server holds. Here the server takes a fixed number of steps of the clients' optimizer and
holds no labels. The ensemble weighs all clients equally; the means of models follow
``client_weights``. The student learns in evaluation mode, in which the ensemble also answers (see
``on_public``). A foundation model's answers are not used, because they are over other classes.
``server_steps = 0`` is FedAvg within each role.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax

from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    ServerData,
    Setup,
    init_shared,
)
from fedhelp_jax.algorithms.local_training import train_locally, training_client
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.algorithms.on_public import check_public, learn_answers, public_logits
from fedhelp_jax.core.tree import choose, weighted_mean
from fedhelp_jax.data.federation import ROLES, PublicPool
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import setting, whole


@dataclasses.dataclass(frozen=True)
class FedDFSettings:
    """Settings of FedDF."""

    server_steps: int = setting(
        100,
        "public batches the server learns from each round; 0 is FedAvg within each role",
        whole(0),
    )


@method(FedDFSettings, uses_public=True, unused=("server",))
def feddf(setup: Setup, settings: FedDFSettings) -> FederatedAlgorithm:
    """FedDF: ensemble distillation on public images after averaging.

    Raises:
      UserError: Without public images.
    """
    check_public(setup, "feddf")

    def client(role: str) -> ClientAlgorithm:
        train = functools.partial(train_locally, setup, setup.models[role])
        return training_client(setup, train, role)

    def aggregate(
        state: dict[str, Variables],
        uploads: Mapping[str, Variables],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> dict[str, Variables]:
        public = data.public
        assert public is not None
        logits = {
            role: jax.lax.map(
                functools.partial(public_logits, setup, setup.models[role], public=public), upload
            )
            for role, upload in uploads.items()
        }
        # If no upload of a role counts, the role starts from its previous model.
        means = {
            role: choose(
                (weights[role] > 0).any(), weighted_mean([upload], [weights[role]]), state[role]
            )
            for role, upload in uploads.items()
        }
        present = [(w > 0).astype(float) for w in weights.values()]
        ensemble = PublicPool(public.images, None, weighted_mean(list(logits.values()), present))
        fused = {
            role: learn_answers(
                setup,
                setup.models[role],
                data.key,
                means[role],
                ensemble,
                settings.server_steps,
                functools.partial(setup.task.distill, temperature=1.0, where=None),
            )
            for role in uploads
        }
        return {**state, **fused}

    return FederatedAlgorithm(
        init=lambda run_key: {role: init_shared(setup, run_key, role) for role in ROLES},
        download=lambda state, role: state[role],
        clients={role: client(role) for role in ROLES},
        aggregate=aggregate,
        server_trains=True,
    )
