"""FedAvg of a linear head on what a foundation model answers about the clients' own images.

    w_i <- w after local epochs on client i          w = (W, b), logits W x + b
    w   <- sum_i a_i w_i

x is the model's logits or embedding of an image, standardised over its own values. Clients deploy
the broadcast head (``global``); their copy after training is also reported (``personal``).

Notes: as `foundation_probe`, it needs a model that runs at the clients. The head starts at zero.
"""

import dataclasses
import functools

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.linear_probe import shared_linear_model, with_model
from fedhelp_jax.algorithms.local_training import train_locally, training_client
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.data.federation import ROLES


@dataclasses.dataclass(frozen=True)
class FederatedProbeSettings:
    """The federated probe has no settings of its own."""


@method(FederatedProbeSettings, reads_answers=True, unused=("model", "data.augment"))
def federated_probe(setup: Setup, settings: FederatedProbeSettings) -> FederatedAlgorithm:
    """FedAvg of a linear head on a foundation model that runs at the clients.

    Raises:
      UserError: If the run is about masks.
    """
    del settings
    model = shared_linear_model(setup.num_classes)
    setup = with_model(setup, model, "federated_probe")
    client = training_client(setup, functools.partial(train_locally, setup, model))
    return averaging(setup, dict.fromkeys(ROLES, client))
