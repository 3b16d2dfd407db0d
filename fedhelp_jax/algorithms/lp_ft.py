"""LP-FT: FedAvg, after which every client fine-tunes the head first and then the whole network.

Chen et al., "A Closer Look at Personalized Fine-Tuning in Heterogeneous Federated Learning",
arXiv:2511.12695, after Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022, arXiv:2202.10054. From the broadcast w, on the client's own data:

    head:      for head_epochs, only the head is trained; the features stay those of w
    all:       then, for all_epochs, the whole network
    deployed:  the result (``personal``); w itself is reported too (``global``)

``head_epochs = 0`` is plain fine-tuning, and ``all_epochs = 0`` linear probing.

Notes: batches are normalised by their own statistics in both phases, as in training. The order of
the batches is the same whenever a client fine-tunes, so that its model depends on nothing else.
Nothing of the fine-tuning is sent.
"""

import dataclasses
import functools

import jax
import optax

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import ClientAlgorithm, FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.local_training import train_locally, training_client
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import setting, whole


@dataclasses.dataclass(frozen=True)
class LpFtSettings:
    """Settings of LP-FT."""

    head_epochs: int = setting(5, "passes over its data that a client trains the head", whole(0))
    all_epochs: int = setting(5, "passes that it then trains the whole network", whole(0))


@method(LpFtSettings, unused=LARGE_NETWORK)
def lp_ft(setup: Setup, settings: LpFtSettings) -> FederatedAlgorithm:
    """LP-FT: FedAvg, then each client fine-tunes the head first and then the whole network."""
    model = setup.models["small"]
    client = training_client(setup, functools.partial(train_locally, setup, model), personal=False)

    def deploy(w: Variables, state: tuple[()], data: ClientData) -> dict[str, Variables]:
        del state
        return {"personal": fine_tuned(setup, settings, w, data), "global": w}

    client = ClientAlgorithm(
        models={"personal": model, "global": model},
        init=client.init,
        update=client.update,
        deploy=deploy,
        adapts=True,
    )
    return averaging(setup, dict.fromkeys(ROLES, client))


def fine_tuned(
    setup: Setup, settings: LpFtSettings, variables: Variables, data: ClientData
) -> Variables:
    """Returns a client's network after both phases, each with a fresh optimizer."""
    model, key = setup.models["small"], jax.random.key(0)
    frozen = optax.masked(optax.set_to_zero(), {"features": True, "head": False})
    for phase, epochs, tx in (
        (0, settings.head_epochs, optax.chain(setup.tx, frozen)),
        (1, settings.all_epochs, setup.tx),
    ):
        if epochs:
            given = setup._replace(local_epochs=epochs)
            own = jax.random.fold_in(key, phase)
            variables, _ = train_locally(given, model, own, variables, data, tx=tx)
    return variables
