"""FedAvg.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017, arXiv:1602.05629, algorithm 1:

    w_i <- w after local epochs on client i
    w   <- sum_i a_i w_i

Every client uses the small architecture and deploys the broadcast model (``global``). Its copy
after local training, which is fine-tuned FedAvg, is also reported (``personal``).

Notes: batch statistics are averaged like parameters.
"""

import dataclasses
import functools

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.class_priors import LOCAL_PRIORS, with_local_priors
from fedhelp_jax.algorithms.local_training import train_locally, training_client
from fedhelp_jax.algorithms.method import LARGE_NETWORK, method
from fedhelp_jax.data.federation import ROLES
from fedhelp_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class FedAvgSettings:
    """Settings of FedAvg."""

    personal: bool = setting(
        True, "whether a client's copy is kept, to be measured; off for thousands of clients"
    )
    local_priors: bool = setting(False, LOCAL_PRIORS)


@method(FedAvgSettings, unused=LARGE_NETWORK)
def fedavg(setup: Setup, settings: FedAvgSettings) -> FederatedAlgorithm:
    """FedAvg: the server averages the models that clients train locally."""
    train = functools.partial(train_locally, setup, setup.models["small"])
    client = training_client(setup, train, personal=settings.personal)
    if settings.local_priors:
        client = with_local_priors(setup, client)
    return averaging(setup, dict.fromkeys(ROLES, client))
