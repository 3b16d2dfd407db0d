"""Worker: FedAvg by ``pfl``, in one process, or in several that divide the users among them.

`FederatedAlgorithm.run` contains the loop over rounds, so each question runs it once for the
requested rounds, on the model of the previous run. The first round also evaluates every user, which
pfl cannot be told to skip; it does not count.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OPTIONS = json.loads(sys.argv[1])
RANK = int(os.environ.get("PFL_WORKER_RANK", "0"))


def start_others() -> None:
    """Starts the processes of rank 1 and above; pfl reads their addresses when it is imported."""
    workers = OPTIONS["workers"]
    if workers == 1 or RANK > 0:
        return
    sockets = [socket.create_server(("localhost", 0)) for _ in range(workers)]
    addresses = [f"localhost:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    os.environ["PFL_WORKER_ADDRESSES"] = ",".join(addresses)
    for rank in range(1, workers):
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers_pfl", sys.argv[1]],
            env={**os.environ, "PFL_WORKER_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
        )
    os.environ["PFL_WORKER_RANK"] = "0"


start_others()

import numpy as np  # noqa: E402
import pfl.version  # noqa: E402
import torch  # noqa: E402
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.aggregate.weighting import WeightByUser  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.callback.base import TrainingProcessCallback  # noqa: E402
from pfl.data.dataset import Dataset  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.data.sampling import get_user_sampler  # noqa: E402
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # noqa: E402
from pfl.metrics import Metrics, Weighted  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks.alternate import serve  # noqa: E402
from benchmarks.peers_torch import Network, to_weights, use_threads, user_data  # noqa: E402
from benchmarks.peers_workload import load_workload  # noqa: E402


class Classifier(Network):
    """The network with the two methods that pfl requires."""

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the training loss."""
        return functional.cross_entropy(self(inputs), targets)

    @torch.no_grad()
    def metrics(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Weighted]:
        """Returns the metrics that an evaluation accumulates."""
        total = functional.cross_entropy(self(inputs), targets, reduction="sum")
        return {"loss": Weighted(total.item(), len(targets))}


class Stopwatch(TrainingProcessCallback):
    """Records when each round ended."""

    def __init__(self):
        self.ends: list[float] = []

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        """Records the time, and does not stop the run."""
        self.ends.append(time.perf_counter())
        return False, Metrics()


def going_on(answer: bool = True) -> bool:
    """Returns the answer of the first process, for which the others wait."""
    if OPTIONS["workers"] == 1:
        return answer
    flag = torch.tensor([int(answer)])
    torch.distributed.broadcast(flag, src=0)
    return bool(flag.item())


def main() -> None:
    use_threads(OPTIONS["threads"])
    np.random.seed(0)
    workload = load_workload(OPTIONS["folder"])
    users = range(len(workload.owned))
    data = {user: user_data(workload, user) for user in users}
    # pfl's benchmark samples with replacement. The other sampler is for rounds of all users.
    sampler = get_user_sampler("minimize_reuse" if OPTIONS["all"] else "random", users)
    federated = FederatedDataset(lambda user: Dataset(data[user], user_id=user), sampler)
    network = Classifier(workload.weights)
    model = PyTorchModel(
        model=network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
    )
    backend = SimulatedBackend(federated, federated, postprocessors=[WeightByUser()])
    count = OPTIONS["warm_up"] + OPTIONS["rounds"]

    def run() -> list[float]:
        stopwatch = Stopwatch()
        began = time.perf_counter()
        FederatedAveraging().run(
            algorithm_params=NNAlgorithmParams(
                central_num_iterations=count,
                evaluation_frequency=count,
                train_cohort_size=OPTIONS["cohort"],
                val_cohort_size=0,
            ),
            backend=backend,
            model=model,
            model_train_params=NNTrainHyperParams(
                local_num_epochs=1,
                local_learning_rate=OPTIONS["rate"],
                local_batch_size=OPTIONS["batch_size"],
            ),
            model_eval_params=NNEvalHyperParams(local_batch_size=None),
            callbacks=[stopwatch],
            send_metrics_to_platform=False,
        )
        return [began, *stopwatch.ends]

    if RANK > 0:
        while going_on():
            run()
        return

    def round() -> dict[str, float]:
        going_on()
        times = run()
        return {"seconds": (times[-1] - times[OPTIONS["warm_up"]]) / OPTIONS["rounds"]}

    def result() -> str:
        np.savez(Path(OPTIONS["folder"]) / "pfl.npz", **to_weights(network))
        return "pfl.npz"

    version = f"pfl {pfl.version.__version__}, torch {torch.__version__}"
    serve({"version": version}, {"round": round, "result": result})
    going_on(False)


if __name__ == "__main__":
    main()
