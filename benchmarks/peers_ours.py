"""Worker: FedAvg by ``fedhelp_jax``, on a custom network."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.alternate import device_peak_gib, peak_gib, serve
from benchmarks.peers_workload import CLASSES, SIDE, Weights, load_workload
from fedhelp_jax.algorithms.base import Setup
from fedhelp_jax.algorithms.client import sgd_l2
from fedhelp_jax.algorithms.fedavg import FedAvgSettings, fedavg
from fedhelp_jax.core.compilation import compile_totals
from fedhelp_jax.data.federation import make_federation
from fedhelp_jax.data.types import ClientSplit, FederatedDataset
from fedhelp_jax.models.conv import conv, max_pool
from fedhelp_jax.models.layers import linear
from fedhelp_jax.models.model import Model
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.round import RoundProgram, num_clients
from fedhelp_jax.simulation.streaming import StreamedRounds
from fedhelp_jax.simulation.vectorize import make_mapping
from fedhelp_jax.tasks import classification

# PyTorch's names of the layers, in the order of the network.
LAYERS = ("0", "2", "6", "8")


def from_torch(weights: Weights) -> dict[str, Any]:
    """Returns PyTorch's weights as our parameters."""

    def layer(name: str) -> dict[str, np.ndarray]:
        kernel = weights[f"{name}.weight"]
        axes = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
        return {"kernel": kernel.transpose(axes), "bias": weights[f"{name}.bias"]}

    *features, head = map(layer, LAYERS)
    return {"features": features, "head": head}


def to_torch(params: dict[str, Any]) -> Weights:
    """Returns our parameters as PyTorch's weights."""
    weights = {}
    for name, layer in zip(LAYERS, [*params["features"], params["head"]], strict=True):
        kernel = np.asarray(layer["kernel"])
        weights[f"{name}.weight"] = kernel.transpose((3, 2, 0, 1) if kernel.ndim == 4 else (1, 0))
        weights[f"{name}.bias"] = np.asarray(layer["bias"])
    return weights


def network(weights: Weights) -> Model:
    """Returns the peers' network, initialised with ``weights``."""

    def init(key: jax.Array, sample_shape: tuple[int, ...]) -> Any:
        del key, sample_shape
        return {"params": jax.tree.map(jnp.asarray, from_torch(weights)), "batch_stats": {}}

    def convolve(layer: Any, x: jax.Array) -> jax.Array:
        out = conv(x, layer["kernel"], padding=0)
        return jax.nn.relu(out + layer["bias"][:, None, None, None])

    def features(variables: Any, x: jax.Array, *, train: bool, mask: Any = None) -> Any:
        del train, mask  # no layer depends on the batch
        first, second, dense = variables["params"]["features"]
        h = x.transpose(3, 0, 1, 2)
        h = max_pool(convolve(second, convolve(first, h)))
        h = h.swapaxes(0, 1).reshape(x.shape[0], -1)
        return jax.nn.relu(linear(dense, h)), variables["batch_stats"]

    return Model(init, features, linear)


def main() -> None:
    options = json.loads(sys.argv[1])
    jax.config.update("jax_enable_x64", options["float64"])
    if jax.config.jax_platforms in (None, "cpu"):  # as the command line does
        devices = options.get("devices", len(os.sched_getaffinity(0)))
        jax.config.update("jax_num_cpu_devices", devices)
    workload = load_workload(options["folder"])
    users = len(workload.owned)
    clients = tuple(
        ClientSplit(f"user_{i}", rows, rows[:0], rows[:0])
        for i, rows in enumerate(workload.owned.astype(np.int32))
    )
    labels = workload.labels.astype(np.int32)
    names = tuple(map(str, range(CLASSES)))
    dataset = FederatedDataset("synthetic", True, workload.images, labels, names, clients)
    model = network(workload.weights)
    setup = Setup(
        task=classification,
        num_classes=CLASSES,
        sample_shape=(SIDE, SIDE, 3),
        models={"small": model, "large": model},
        tx=sgd_l2(options["rate"], 0.0),
        batch_size=options["batch_size"],
        public_batch_size=1,
        local_epochs=1,
        public=None,
    )
    max_device_bytes = options.get("max_device_bytes", 0)
    federation = make_federation(dataset, ["small"] * users, on_host=max_device_bytes > 0)
    mapping = make_mapping()
    phases = RoundProgram(
        fedavg.build(setup, FedAvgSettings(personal=False)),
        classification,
        num_clients(federation),
        mapping,
        participation_rate=options["cohort"] / users,
    )
    if max_device_bytes:
        simulation = StreamedRounds(phases, federation, seed=0, max_device_bytes=max_device_bytes)
    else:
        simulation = CompiledRounds(phases, federation, seed=0)
    compile_totals()  # starts counting
    state, number = simulation.init(), 0

    def one_round() -> None:
        nonlocal state, number
        state, _ = simulation.round(state, number)
        jax.block_until_ready(state)
        number += 1

    def round() -> dict[str, float]:
        for _ in range(options["warm_up"]):
            one_round()
        began = time.perf_counter()
        for _ in range(options["rounds"]):
            one_round()
        return {
            "seconds": (time.perf_counter() - began) / options["rounds"],
            **used(),
        }

    def used() -> dict[str, float | None]:
        return {
            "compile_s": compile_totals().seconds,
            "peak_gib": peak_gib(),
            "device_gib": device_peak_gib(),
        }

    def result() -> str:
        weights = to_torch(state.server.variables["params"])
        np.savez(Path(options["folder"]) / "fedhelp_jax.npz", **weights)
        return "fedhelp_jax.npz"

    device = mapping.mesh.devices.flat[0]
    about = {
        "version": f"jax {jax.__version__}",
        "how": f"{mapping.num_devices} x {device.device_kind}, chunks of {mapping.chunk_size}",
    }
    serve(about, {"round": round, "used": used, "result": result})


if __name__ == "__main__":
    main()
