"""Worker: FedAvg by Flower's simulation, whose Ray actors train the users.

Each question runs a whole simulation from the final weights of the previous one, so that no Ray
process is active while others are timed. A round lasts from the strategy's selection of users to
the next selection. The first round, in which the actors import torch and read the data, does not
count.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import flwr
import numpy as np
import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional

from benchmarks.alternate import serve
from benchmarks.peers_torch import Network, to_weights, use_threads, user_data
from benchmarks.peers_workload import SHAPES, Workload, load_workload

app = ClientApp()


@functools.cache
def loaded(folder: str, threads: int) -> tuple[Workload, Network]:
    """Loads the workload and the network once per actor."""
    use_threads(threads)
    workload = load_workload(folder)
    return workload, Network(workload.weights)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains a user for one epoch in a random order."""
    config = message.content["config"]
    workload, network = loaded(config["folder"], config["threads"])
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(network.parameters(), config["rate"])
    images, labels = user_data(workload, context.node_config["partition-id"])
    for rows in torch.randperm(len(labels)).split(config["batch_size"]):
        optimizer.zero_grad()
        functional.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
    content = {
        "arrays": ArrayRecord(network.state_dict()),
        "metrics": MetricRecord({"num-examples": len(labels)}),
    }
    return Message(content=RecordDict(content), reply_to=message)


class Timed(FedAvg):
    """FedAvg that records when its rounds begin."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.times: list[float] = []

    def configure_train(self, *args: Any, **options: Any) -> Any:
        """Records the time and chooses the users."""
        self.times.append(time.perf_counter())
        return super().configure_train(*args, **options)


def main() -> None:
    options = json.loads(sys.argv[1])
    # Imported by name, so that actors import it too instead of receiving it with every user.
    from benchmarks.peers_flower import app

    # Lets Ray's actors import the package `benchmarks`, which is in this folder's parent.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    workload = load_workload(options["folder"])
    users, warm_up = len(workload.owned), options["warm_up"]
    now = ArrayRecord(Network(workload.weights).state_dict())

    def run() -> list[float]:
        nonlocal now
        strategy = Timed(
            fraction_train=options["cohort"] / users,
            fraction_evaluate=0.0,
            min_train_nodes=options["cohort"],
            min_available_nodes=users,
        )
        server = ServerApp()
        config = ConfigRecord({k: options[k] for k in ("folder", "threads", "rate", "batch_size")})

        @server.main()
        def rounds(grid: Grid, context: Context) -> None:
            nonlocal now
            count = warm_up + options["rounds"]
            now = strategy.start(grid, now, num_rounds=count, train_config=config).arrays
            strategy.times.append(time.perf_counter())

        run_simulation(
            server,
            app,
            num_supernodes=users,
            backend_config={
                "init_args": {"num_cpus": options["workers"] * options["threads"]},
                "client_resources": {"num_cpus": options["threads"], "num_gpus": 0.0},
            },
        )
        return strategy.times

    def round() -> dict[str, float]:
        times = run()
        return {"seconds": (times[-1] - times[warm_up]) / options["rounds"]}

    def result() -> str:
        network = Network(workload.weights)
        network.load_state_dict(now.to_torch_state_dict())
        weights = to_weights(network)
        np.savez(Path(options["folder"]) / "flower.npz", **{name: weights[name] for name in SHAPES})
        return "flower.npz"

    version = f"flwr {flwr.__version__}, ray {ray.__version__}, torch {torch.__version__}"
    serve({"version": version}, {"round": round, "result": result})


if __name__ == "__main__":
    main()
