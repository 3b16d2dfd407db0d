"""Worker: FedAvg by ``blazefl``, with clients in threads, in processes or sequentially."""

import copy
import functools
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # no progress bar for every round

import numpy as np
import torch
import torch._dynamo  # otherwise every forked process imports it in every round
from blazefl.contrib import (
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgThreadPoolClientTrainer,
)
from blazefl.core import IPCMode
from blazefl.reproducibility import setup_reproducibility
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.alternate import serve
from benchmarks.peers_torch import Network, to_weights, use_threads, user_data
from benchmarks.peers_workload import load_workload


@functools.cache
def template(folder: Path) -> Network:
    return Network(load_workload(folder).weights)


class Selector:
    """Copies one network, which is faster than drawing new weights for every user."""

    def __init__(self, folder: Path):
        self._folder = folder

    def select_model(self, model_name: str) -> Network:
        """Returns a copy of the network."""
        del model_name
        return copy.deepcopy(template(self._folder))


class Files:
    """The users' data in one file per user, as in blazefl's examples; processes get its name."""

    def __init__(self, folder: Path, shuffle: bool):
        self._folder, self._shuffle = folder, shuffle

    def put(self, user: int, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Writes a user's file."""
        torch.save((images, labels), self._folder / f"{user}.pt")

    def get_dataset(self, type_: str, cid: int | None) -> TensorDataset:
        """Reads a user's file."""
        return TensorDataset(*torch.load(self._folder / f"{cid}.pt"))

    def set_dataset(self, type_: str, cid: int | None, dataset: Any) -> None:
        """Does nothing, since the data do not change."""

    def get_dataloader(
        self,
        type_: str,
        cid: int | None,
        batch_size: int | None,
        generator: torch.Generator | None = None,
    ) -> DataLoader:
        """Returns the batches of a user's images."""
        dataset = self.get_dataset(type_, cid)
        return DataLoader(
            dataset, batch_size=batch_size, shuffle=self._shuffle, generator=generator
        )


def main() -> None:
    options = json.loads(sys.argv[1])
    use_threads(options["threads"])
    folder = Path(options["folder"])
    workload = load_workload(folder)
    users = len(workload.owned)
    (folder / "users").mkdir(exist_ok=True)
    files = Files(folder / "users", shuffle=not options["all"])
    for user in range(users):
        files.put(user, *user_data(workload, user))
    selector = Selector(folder)
    setup_reproducibility(0)
    shared: dict[str, Any] = {
        "model_selector": selector,
        "model_name": "cnn",
        "dataset": files,
        "device": "cpu",
        "num_clients": users,
        "batch_size": options["batch_size"],
        "seed": 0,
    }
    handler = FedAvgBaseServerHandler(
        global_round=sys.maxsize, sample_ratio=options["cohort"] / users, **shared
    )
    shared |= {"epochs": 1, "lr": options["rate"]}
    match options["mode"]:
        case "threads":
            trainer = FedAvgThreadPoolClientTrainer(num_parallels=options["workers"], **shared)
        case "processes":
            trainer = FedAvgProcessPoolClientTrainer(
                num_parallels=options["workers"],
                ipc_mode=IPCMode.SHARED_MEMORY,
                share_dir=folder / "share",
                state_dir=folder / "state",
                **shared,
            )
        case _:
            trainer = FedAvgBaseClientTrainer(**shared)

    def one_round() -> None:
        chosen = handler.sample_clients()
        trainer.local_process(handler.downlink_package(), chosen)
        for package in trainer.uplink_package():
            handler.load(package)

    def round() -> dict[str, float]:
        for _ in range(options["warm_up"]):
            one_round()
        began = time.perf_counter()
        for _ in range(options["rounds"]):
            one_round()
        return {"seconds": (time.perf_counter() - began) / options["rounds"]}

    def result() -> str:
        np.savez(folder / "blazefl.npz", **to_weights(handler.model))
        return "blazefl.npz"

    about = f"blazefl {version('blazefl')}, torch {torch.__version__}"
    serve({"version": about}, {"round": round, "result": result})


if __name__ == "__main__":
    main()
