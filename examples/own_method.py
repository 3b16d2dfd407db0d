r"""A custom method, FedEMA: the server keeps a moving average of the clients' mean.

    fedhelp train --config=configs/quickstart.py --workdir=runs/fedema \
        --config.algorithm.name=own_method:fedema --config.algorithm.decay=0.8

This command needs the folder of this file on ``PYTHONPATH``.
"""

import dataclasses
import functools

import jax

import fedhelp_jax as fh
from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.local_training import train_locally, training_client
from fedhelp_jax.settings import setting, within


@dataclasses.dataclass(frozen=True)
class FedEMASettings:
    """Settings of FedEMA."""

    decay: float = setting(0.5, "share of the old model in the new one", within(0, 1, closed=True))


@fh.algorithms.method(FedEMASettings, unused=("server", "model.large"))
def fedema(setup: fh.algorithms.Setup, settings: FedEMASettings):
    """FedAvg on the small architecture, whose server keeps a moving average."""
    train = functools.partial(train_locally, setup, setup.models["small"])
    client = training_client(setup, train)
    plain = averaging(setup, {"small": client, "large": client})

    def aggregate(state, uploads, weights, data):
        mean = plain.aggregate(state, uploads, weights, data)
        keep = settings.decay
        return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state, mean)

    return plain._replace(aggregate=aggregate)


if __name__ == "__main__":
    data = fh.data.load("phantoms", num_examples=400, image_size=16)
    network = fh.models.cnn((8, 32), data.num_classes)
    sim = fh.Simulation(fedema(small=network, decay=0.8), data, batch_size=16)
    state = sim.init(jax.random.key(0))
    for _ in range(5):
        state, info = sim.step(state)
    print(sim.clients(state, "test"))
