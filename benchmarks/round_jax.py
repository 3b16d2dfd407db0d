"""Worker: FedHelp rounds of one role by ``fedhelp_jax``; saves the initial state for its rivals."""

import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.alternate import device_peak_gib, serve
from fedhelp_jax.algorithms.base import PublicSpec, Setup
from fedhelp_jax.algorithms.client import adam_l2, shuffled
from fedhelp_jax.algorithms.fedhelp import FedHelpSettings, fedhelp
from fedhelp_jax.core import compilation
from fedhelp_jax.core.random import Purpose, client_round_key, for_purpose
from fedhelp_jax.data.federation import make_federation
from fedhelp_jax.data.types import ClientSplit, FederatedDataset, PublicDataset
from fedhelp_jax.models.model import with_compute_dtype
from fedhelp_jax.models.resnet import resnet
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.round import RoundProgram, num_clients
from fedhelp_jax.simulation.vectorize import make_mapping
from fedhelp_jax.tasks import classification

OPTIONS = json.loads(sys.argv[1])
CLASSES, PUBLIC, ANSWERS = 8, 256, 10
ROUNDS = 2  # rounds whose batches the rivals get; their later rounds reuse those of the last one


def datasets(rng: np.random.Generator) -> tuple[FederatedDataset, PublicDataset, np.ndarray]:
    """Makes data sets of random pixels, labels and answers."""
    clients, side = OPTIONS["clients"], OPTIONS["image_size"]
    each = OPTIONS["steps"] * OPTIONS["batch_size"]
    images = rng.integers(0, 256, (clients * each, side, side, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, len(images)).astype(np.int32)
    own = np.arange(len(images), dtype=np.int32).reshape(clients, each)
    splits = tuple(ClientSplit(f"c{i}", rows, rows[:1], rows[:1]) for i, rows in enumerate(own))
    names = tuple(map(str, range(CLASSES)))
    public = rng.integers(0, 256, (PUBLIC, side, side, 3), dtype=np.uint8)
    public_labels = rng.integers(0, ANSWERS, PUBLIC).astype(np.int32)
    answers = rng.normal(size=(PUBLIC, ANSWERS)).astype(float if OPTIONS["float64"] else np.float32)
    return (
        FederatedDataset("noise", True, images, labels, names, splits),
        PublicDataset("noise", True, public, public_labels, None, (), public),
        answers,
    )


def batches(run_key: jax.Array, clients: int) -> dict[str, np.ndarray]:
    """Returns the private and public images of each batch, as indices ``[ROUNDS, K, steps, B]``."""
    steps, size = OPTIONS["steps"], OPTIONS["batch_size"]

    def one(round: int, client: int) -> tuple[np.ndarray, np.ndarray]:
        key = client_round_key(run_key, round, client)
        private = jax.random.fold_in(for_purpose(key, Purpose.PRIVATE_BATCHES), 0)
        order = np.asarray(shuffled(private, steps * size, steps * size)) + client * steps * size
        public = np.asarray(shuffled(for_purpose(key, Purpose.PUBLIC_BATCHES), PUBLIC, PUBLIC))
        return order.reshape(steps, size), np.resize(public, (steps, size))

    found = [[one(round, client) for client in range(clients)] for round in range(ROUNDS)]
    return {
        name: np.array([[pair[i] for pair in row] for row in found])
        for i, name in enumerate(("private", "public"))
    }


def main() -> None:
    jax.config.update("jax_enable_x64", OPTIONS["float64"])
    if jax.config.jax_platforms in (None, "cpu"):  # as the command line does
        cores = len(os.sched_getaffinity(0))
        jax.config.update("jax_num_cpu_devices", OPTIONS.get("devices", cores))
    if OPTIONS.get("splitting"):
        compilation.compiler_options = lambda *_, **__: {}
    role, size = OPTIONS["role"], OPTIONS["batch_size"]
    dataset, public, answers = datasets(np.random.default_rng(0))
    models = {
        "small": resnet(OPTIONS.get("depth", 20), CLASSES),
        "large": resnet(OPTIONS["large_depth"], CLASSES),
    }
    dtype = OPTIONS.get("compute_dtype", "float32")
    if dtype != "float32" and not OPTIONS["float64"]:
        models = {name: with_compute_dtype(model, dtype) for name, model in models.items()}
    setup = Setup(
        task=classification,
        num_classes=CLASSES,
        sample_shape=dataset.images.shape[1:],
        models=models,
        tx=adam_l2(1e-3, 1e-4),
        batch_size=size,
        public_batch_size=size,
        local_epochs=1,
        public=PublicSpec(num_images=PUBLIC, num_labels=ANSWERS, num_answers=ANSWERS, shared=True),
    )
    roles = [role] * OPTIONS["clients"]
    mapping = make_mapping(OPTIONS.get("chunk_size"))
    federation = make_federation(dataset, roles, public, answers)
    method = fedhelp.build(setup, FedHelpSettings())
    phases = RoundProgram(method, classification, num_clients(federation), mapping)
    simulation = CompiledRounds(phases, federation, seed=0)
    compiled = compilation.compile_totals().seconds
    state = simulation.init()
    start = {
        "w": state.server.averaged.variables,
        "clients": state.clients[role].public_heads if role == "small" else state.clients[role],
        "batches": batches(simulation.run_key, OPTIONS["clients"]),
        "images": dataset.images,
        "labels": dataset.labels,
        "public_images": public.images,
        "public_labels": public.labels,
        "answers": answers,
    }
    folder = Path(OPTIONS["folder"])
    (folder / "start.pickle").write_bytes(pickle.dumps(jax.tree.map(np.asarray, start)))
    now: list[Any] = [state, 0]
    jax.block_until_ready(simulation.round(jax.tree.map(jnp.copy, state), 0))
    compiled = compilation.compile_totals().seconds - compiled

    def round() -> dict[str, float]:
        began = time.perf_counter()
        now[0], _ = simulation.round(now[0], now[1])
        jax.block_until_ready(now[0])
        now[1] += 1
        return {"seconds": time.perf_counter() - began}

    def evaluate() -> dict[str, float]:
        began = time.perf_counter()
        simulation.evaluate(now[0], "train")
        return {"seconds": time.perf_counter() - began}

    def result() -> str:
        variables = jax.tree.map(np.asarray, now[0].server.averaged.variables)
        (folder / "fedhelp_jax.pickle").write_bytes(pickle.dumps(variables))
        return "fedhelp_jax.pickle"

    def memory() -> dict[str, float | None]:
        return {"device_gib": device_peak_gib()}

    device = mapping.mesh.devices.flat[0]
    about = {
        "version": f"jax {jax.__version__}",
        "how": f"{mapping.num_devices} x {device.device_kind}, chunks of {mapping.chunk_size}",
        "devices": mapping.num_devices,
        "compile_s": compiled,
    }
    questions = {"round": round, "evaluate": evaluate, "memory": memory, "result": result}
    serve(about, questions)


if __name__ == "__main__":
    main()
