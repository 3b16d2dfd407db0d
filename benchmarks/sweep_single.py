"""Worker: runs of the quickstart one by one in one process, each as a sweep computes it."""

import json
import os
import sys
import time
from typing import Any

import jax

from benchmarks.alternate import device_peak_gib, serve
from fedhelp_jax.core.compilation import keep_programs
from fedhelp_jax.data.cache import cache_folder
from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.experiments.experiment import build_experiment
from fedhelp_jax.report.summary import group_summary, headline


def main() -> None:
    options = json.loads(sys.argv[1])
    if jax.config.jax_platforms in (None, "cpu"):  # as the command line does
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    keep_programs(cache_folder(None) / "compiled")

    def one(point: dict[str, str]) -> tuple[float, float]:
        settings = [f"--config.{name}={value}" for name, value in point.items()]
        began = time.perf_counter()
        experiment = build_experiment(read_settings(options["config"], settings))
        simulation = experiment.simulation
        state, _ = simulation.rounds(simulation.init(), 0, experiment.config.rounds)
        results = simulation.evaluate(state, "validation")
        small_mean = group_summary(headline(results, experiment.task.headline))["small_mean"]
        return time.perf_counter() - began, small_mean

    def all_runs() -> dict[str, Any]:
        seconds, small_mean = zip(*map(one, options["points"]), strict=True)
        return {
            "seconds": list(seconds),
            "small_mean": list(small_mean),
            "device_gib": device_peak_gib(),
        }

    serve({"version": f"jax {jax.__version__}"}, {"all": all_runs})


if __name__ == "__main__":
    main()
