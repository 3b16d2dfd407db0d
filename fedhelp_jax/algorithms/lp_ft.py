"""LP-FT: FedAvg, after which every client fine-tunes the head first and then the whole network.

Chen et al., "A Closer Look at Personalized Fine-Tuning in Heterogeneous Federated Learning",
arXiv:2511.12695, after Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022, arXiv:2202.10054. From the received w, on the client's own data:

    head:      for head_epochs, only the head is trained; the features stay those of w
    all:       then, for all_epochs, the whole network
    deployed:  the result (``personal``); w itself is reported too (``global``)

``head_epochs = 0`` is plain fine-tuning, and ``all_epochs = 0`` linear probing.

Notes: clients fine-tune in every round, beside FedAvg's training, so that there is a network to
deploy after each; the paper does it once, at the end, for more epochs. Batches are normalised by
their own statistics in both phases, as in training. Nothing of the fine-tuning is sent.
"""

import dataclasses

import jax
import optax

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.client import Updated
from fedhelp_jax.algorithms.local_training import personal_client, train_locally
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.settings import setting, whole


@dataclasses.dataclass(frozen=True)
class LpFtSettings:
    """Settings of LP-FT."""

    head_epochs: int = setting(2, "passes over its data that a client trains the head", whole(0))
    all_epochs: int = setting(2, "passes that it then trains the whole network", whole(0))


@method(LpFtSettings, unused=LARGE_NETWORK)
def lp_ft(setup: Setup, settings: LpFtSettings) -> FederatedAlgorithm:
    """LP-FT: FedAvg, then each client fine-tunes the head first and then the whole network."""

    def update(key: jax.Array, w: Variables, state: Variables, data: ClientData) -> Updated:
        del state
        upload, info = train_locally(setup, setup.models["small"], key, w, data)
        return fine_tuned(setup, settings, key, w, data), upload, info

    return averaging(setup, dict.fromkeys(ROLES, personal_client(setup, update)))


def fine_tuned(
    setup: Setup, settings: LpFtSettings, key: jax.Array, variables: Variables, data: ClientData
) -> Variables:
    """Returns a client's network after both phases, each with a fresh optimizer."""
    model = setup.models["small"]
    frozen = optax.masked(optax.set_to_zero(), {"features": True, "head": False})
    phases = (
        (settings.head_epochs, optax.chain(setup.tx, frozen)),
        (settings.all_epochs, setup.tx),
    )
    for number, (epochs, tx) in enumerate(phases):
        if epochs:
            given, own = setup._replace(local_epochs=epochs), jax.random.fold_in(key, number)
            variables, _ = train_locally(given, model, own, variables, data, tx=tx)
    return variables
