"""Repeats a sweep alongside busy loops, and prints the number of distinct outcomes as JSON.

    python tests/repeat_sweep.py 5

The sweep has two learning rates and two seeds of FedHelp with ResNet-20 on synthetic images. Like
``repeat_worker.py``, this runs in a separate process.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from repeat_worker import outcomes

from fedhelp_jax.experiments.config import default_config, validate
from fedhelp_jax.experiments.sweep import Program
from fedhelp_jax.experiments.sweep_blocks import Run, blocks

SWEPT = [{"learning_rate": rate, "seed": seed} for rate in (1e-3, 1e-2) for seed in (0, 1)]


def a_run(swept: dict[str, float]) -> Run:
    """Returns one run of the sweep."""
    config = default_config()
    config.rounds, config.batch_size, config.public_batch_size = 1, 16, 16
    # The products are wide on purpose, as in test_repeatability.py.
    config.data.num_examples, config.data.image_size, config.data.max_train = 900, 64, 16
    config.public.num_examples = 32
    config.model.small = config.model.large = "resnet20"
    config.learning_rate, config.seed = swept["learning_rate"], int(swept["seed"])
    return Run(swept, validate(config))


def main() -> None:
    """Counts the distinct outcomes of a round and its evaluation, compared bit for bit."""
    jax.config.update("jax_num_cpu_devices", 2)
    (block,) = blocks([a_run(swept) for swept in SWEPT])
    program = Program(block, "test")

    def some(runs: Sequence[Run]) -> Any:
        # The phases are called directly, since rows of the table hold only means of a few metrics.
        point = program._points(runs)
        state = program._init(program.shared, point, ())
        state, _ = program._rounds(program.shared, point, state, np.int32(0), np.int32(1))
        return state, program._evaluate(program.shared, point, state)

    parts = [block.runs[i : i + program.slots] for i in range(0, len(block.runs), program.slots)]
    times = outcomes(
        int(sys.argv[1]), lambda: [some(p) for p in parts], "ours", os.cpu_count() or 1
    )
    print(json.dumps({"sweeps": times, "runs": sum(map(len, parts))}))


if __name__ == "__main__":
    main()
