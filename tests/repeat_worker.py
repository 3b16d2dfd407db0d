"""Repeats the phases of a simulation, and prints the number of distinct outcomes of each as JSON.

    python tests/repeat_worker.py '{"network": "resnet20", "devices": 2, "evaluations": 50}'

The same state must give the same bits every time, whatever else the machine and the process do.
This runs in a separate process, since the number of CPU devices and XLA's flags can be chosen only
once. The keys of the argument are those of `DEFAULTS`.
"""

import concurrent.futures
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fedhelp_jax import tasks
from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.algorithms.base import PublicSpec, Setup
from fedhelp_jax.algorithms.client import adam_l2
from fedhelp_jax.core import compilation
from fedhelp_jax.core.random import client_round_key
from fedhelp_jax.data.federation import ClientData, Federation, make_federation, normalize_images
from fedhelp_jax.data.types import ClientSplit, FederatedDataset, PublicDataset
from fedhelp_jax.models.model import Model, apply_model
from fedhelp_jax.models.registry import architecture
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.round import RoundProgram, num_clients
from fedhelp_jax.simulation.streaming import StreamedRounds
from fedhelp_jax.simulation.vectorize import make_mapping

CLASSES, PUBLIC, ANSWERS = 8, 32, 6

DEFAULTS: dict[str, Any] = {
    "network": "resnet20",  # the network of all clients
    "method": "local",
    "task": "classification",
    "clients": 4,  # the first half are large
    "devices": 2,
    "size": 32,  # side length of an image
    "batch": 16,
    "eval_batch": 64,
    "train": 64,  # training examples per client
    "test": 128,
    "evaluations": 0,
    "rounds": 0,  # repetitions of the first round
    "predictions": 0,
    "streams": 0,  # repetitions of a round and an evaluation with images in host memory
    "direct": False,  # compare with Python loops, without shard_map
    "float64": False,
    "safe": True,  # use the compiler options of the package
    "busy": "ours",  # the program that runs alongside in the process: ours, others or none
    "loops": 0,  # number of busy loops that run alongside, each in its own process
}


def build_network(name: str) -> Model:
    """Builds a network of the package by its name in configs."""
    found = architecture(name, "network")
    if "segmentation" in found.tasks:
        return found.build(1, widths=(), norm="batch", remat=False)
    return found.build(CLASSES)


def datasets(options: dict[str, Any]) -> tuple[FederatedDataset, PublicDataset, np.ndarray]:
    """Returns random images with labels or masks, random public images, and answers."""
    draw = np.random.default_rng(0)
    masks, side, each = options["task"] == "segmentation", options["size"], options["train"]
    total = options["clients"] * (each + options["test"])
    shape = (side, side) if masks else ()
    classes = 2 if masks else CLASSES

    def images(count: int) -> np.ndarray:
        return draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)

    def targets(count: int) -> np.ndarray:
        labels = draw.integers(0, classes, (count, *shape))
        return labels.astype(np.uint8 if masks else np.int32)

    own = np.arange(total, dtype=np.int32).reshape(options["clients"], -1)
    splits = tuple(
        ClientSplit(f"c{i}", rows[:each], rows[:1], rows[each:]) for i, rows in enumerate(own)
    )
    names = ("thing",) if masks else tuple(map(str, range(CLASSES)))
    dataset = FederatedDataset("noise", True, images(total), targets(total), names, splits)
    public = images(PUBLIC)
    answers = draw.normal(size=(PUBLIC, *shape, 1 if masks else ANSWERS)).astype(np.float32)
    public_data = PublicDataset("noise", True, public, targets(PUBLIC), None, (), public)
    return dataset, public_data, answers


def simulation_of(
    options: dict[str, Any], federation: Federation, **streaming: Any
) -> CompiledRounds:
    """Returns a simulation of the method on the federation."""
    masks, model = options["task"] == "segmentation", build_network(options["network"])
    setup = Setup(
        task=tasks.segmentation(("thing",)) if masks else tasks.classification,
        num_classes=1 if masks else CLASSES,
        sample_shape=(options["size"], options["size"], 3),
        models={"small": model, "large": model},
        # SGD is used for comparisons with loops, since Adam amplifies rounding.
        tx=optax.sgd(1e-3) if options["direct"] else adam_l2(1e-3, 1e-4),
        batch_size=options["batch"],
        public_batch_size=options["batch"],
        local_epochs=1,
        public=PublicSpec(
            num_images=PUBLIC,
            num_labels=1 if masks else CLASSES,
            num_answers=1 if masks else ANSWERS,
            shared=False,
        ),
    )
    method, task = ALGORITHMS[options["method"]], setup.task
    if options["direct"]:  # compare logits, since metrics are computed in float32
        task = task._replace(metrics=lambda logits, targets, mask: {"logits": logits})
    phases = RoundProgram(
        method.build(setup, method.settings()),
        task,
        num_clients(federation),
        make_mapping(num_devices=options["devices"]),
        eval_batch_size=options["eval_batch"],
    )
    return (StreamedRounds if streaming else CompiledRounds)(
        phases, federation, seed=0, **streaming
    )


@contextlib.contextmanager
def other_work(program: str, loops: int) -> Iterator[None]:
    """Keeps the machine and the threads of XLA busy within the context.

    Args:
      program: The program that runs in this process: "ours" with the package's compiler options,
        "others" with JAX's defaults, or "none".
      loops: Number of busy loops, each in its own process.
    """
    command, stop = [sys.executable, "-c", "while True: pass"], threading.Event()

    def keep_busy() -> None:
        if program == "none":
            return
        compute = (compilation.jit if program == "ours" else jax.jit)(_long_loop)
        while not stop.is_set():
            jax.block_until_ready(compute(jnp.ones((512, 512))))

    started = [subprocess.Popen(command) for _ in range(loops)]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        busy = threads.submit(keep_busy)
        try:
            yield
        finally:
            stop.set()
            for loop in started:
                loop.kill()
                loop.wait()
            busy.result()


def _long_loop(x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x * 1.01 + 0.1), x)


def outcomes(times: int, compute: Callable[[], Any], program: str, loops: int) -> int:
    """Returns the number of distinct results, compared bit for bit.

    The first result is computed without `other_work`, since it includes compilation, which takes
    most of the time and is not affected by other work.
    """

    def bits() -> bytes:
        return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(compute()))

    seen = {bits()}
    with other_work(program, loops):
        return len(seen.union(bits() for _ in range(times)))


def error_of_evaluation(simulation: CompiledRounds, federation: Federation, state: Any) -> float:
    """Returns the distance of logits from those of the networks applied batch by batch."""
    worst, measured = 0.0, simulation.evaluate(state, "test")
    for group in simulation.groups:
        client = simulation.phases.algorithm.clients[group.role]
        name, model = next(iter(client.models.items()))
        apply = compilation.jit(lambda v, x, m=model: apply_model(m, v, normalize_images(x))[0])
        for row in range(len(group.names)):
            download, own = one_client(simulation, state, group.role, row)
            variables = client.deploy(download, own, None)[name]
            size = int(group.test.size[row])
            images = np.asarray(federation.pool.images)[np.asarray(group.test.index)[row, :size]]
            expected = np.concatenate(
                [np.asarray(apply(variables, images[i : i + 16])) for i in range(0, size, 16)]
            )
            worst = max(worst, distance(measured[group.role][name]["logits"][row], expected))
    return worst


def error_of_training(simulation: CompiledRounds, federation: Federation, state: Any) -> float:
    """Returns the distance of clients' states after a round from those updated one by one."""
    got, _ = simulation.round(jax.tree.map(jnp.copy, state), 0)
    worst, moved = 0.0, 0.0
    for group in simulation.groups:
        update = compilation.jit(simulation.phases.algorithm.clients[group.role].update)
        for row in range(len(group.names)):
            key = client_round_key(simulation.run_key, 0, group.ids[row])
            download, own = one_client(simulation, state, group.role, row)
            data = ClientData(
                federation.pool, federation.public, group.train.index[row], group.train.size[row]
            )
            expected = jax.tree.leaves(update(key, download, own, data)[0])
            ours = [np.asarray(leaf)[row] for leaf in jax.tree.leaves(got.clients[group.role])]
            worst = max(worst, *map(distance, ours, expected))
            moved = max(moved, *map(distance, ours, jax.tree.leaves(own)))
    assert moved > 1e-4, "nothing was trained"
    return worst


def one_client(simulation: CompiledRounds, state: Any, role: str, row: int) -> tuple[Any, Any]:
    """Returns a client's download from the server and its state, on the host."""
    server, states = jax.tree.map(np.asarray, (state.server, state.clients[role]))
    download = simulation.phases.algorithm.download(server, role)
    return download, jax.tree.map(lambda leaf: leaf[row], states)


def distance(ours: Any, theirs: Any) -> float:
    """Returns the largest difference, divided by the largest value or 1, whichever is larger."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    scale = max(1.0, np.abs(theirs).max(initial=0.0))
    return float(np.abs(ours - theirs).max(initial=0.0)) / scale


def repeat(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the number of outcomes of each phase, and its distance from Python loops."""
    beside = options["busy"], options["loops"]
    dataset, public, answers = datasets(options)
    roles = ["large" if i < options["clients"] // 2 else "small" for i in range(options["clients"])]
    federation = make_federation(dataset, roles, public, answers)
    simulation = simulation_of(options, federation)
    state, found = simulation.init(), {}
    if options["direct"]:
        with other_work(*beside):
            found["evaluation_error"] = error_of_evaluation(simulation, federation, state)
            found["training_error"] = error_of_training(simulation, federation, state)

    phases: dict[str, Callable[[], Any]] = {
        "rounds": lambda: simulation.round(jax.tree.map(jnp.copy, state), 0),
        "evaluations": lambda: simulation.evaluate(state, "test"),
        "predictions": lambda: simulation.predictions(state, simulation.groups[0], 0, "test"),
    }
    if options["streams"]:
        on_host = make_federation(dataset, roles, public, answers, on_host=True)
        example = sum(leaf.nbytes // len(leaf) for leaf in on_host.pool)
        most = 2 * example * max(options["train"], options["test"])
        streamed = simulation_of(options, on_host, max_device_bytes=most)
        start = streamed.init()
        phases["streams"] = lambda: (
            streamed.round(jax.tree.map(jnp.copy, start), 0),
            streamed.evaluate(start, "test"),
        )
    for name, compute in phases.items():
        if options[name]:
            found[name] = outcomes(options[name], compute, *beside)
    return found


def main() -> None:
    """Reads the options and prints the result of `repeat`."""
    given = json.loads(sys.argv[1])
    assert given.keys() <= DEFAULTS.keys(), given.keys() - DEFAULTS.keys()
    options = DEFAULTS | given
    jax.config.update("jax_num_cpu_devices", options["devices"])
    jax.config.update("jax_enable_x64", options["float64"])
    if not options["safe"]:
        compilation.compiler_options = lambda *_, **__: {}
    print(json.dumps(repeat(options)))


if __name__ == "__main__":
    main()
