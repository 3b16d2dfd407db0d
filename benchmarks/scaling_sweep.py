"""Worker: a sweep of FedAvg on phantoms, with a given number of runs."""

import json
import os
import sys
import time

import jax
import numpy as np

from benchmarks.alternate import peak_gib, serve
from fedhelp_jax.experiments import sweep as sweeps
from fedhelp_jax.experiments.config import default_config, validate
from fedhelp_jax.experiments.sweep_blocks import Run, blocks


def runs(count: int) -> list[Run]:
    """Returns runs that differ in the learning rate."""
    found = []
    for rate in np.geomspace(1e-4, 1e-2, count).tolist():
        config = default_config()
        config.algorithm.name, config.learning_rate = "fedavg", rate
        config.model.small = config.model.large = "cnn_large"
        config.rounds, config.checkpoint_every, config.batch_size = 10, 10, 16
        found.append(Run({"learning_rate": rate}, validate(config)))
    return found


def main() -> None:
    options = json.loads(sys.argv[1])
    if jax.config.jax_platforms in (None, "cpu"):  # as the command line does
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    (block,) = blocks(runs(options["runs"]))
    program = sweeps.Program(block, "validation")
    list(program.results())  # compiles the evaluation

    def sweep() -> dict[str, float]:
        began = time.perf_counter()
        list(program.results())
        return {
            "seconds": time.perf_counter() - began,
            "peak_gib": peak_gib(),
        }

    serve({"version": f"jax {jax.__version__}", "how": program.plan()}, {"sweep": sweep})


if __name__ == "__main__":
    main()
