"""Makes one sweep again and again, beside busy loops, and prints how many outcomes it had, as JSON.

    python tests/repeat_sweep.py 2

Two learning rates and two seeds of FedHelp with ResNet-20 on synthetic images. As
``repeat_worker.py`` it is a process of its own.
"""

import json
import os
import sys

import jax
from repeat_worker import OtherWork

from fedhelp_jax.config import default_config, validate
from fedhelp_jax.sweep import Program
from fedhelp_jax.sweep_blocks import Run, blocks

SWEPT = [{"learning_rate": rate, "seed": seed} for rate in (1e-3, 1e-2) for seed in (0, 1)]


def a_run(swept: dict[str, float]) -> Run:
    """One run of the sweep."""
    config = default_config()
    config.rounds, config.batch_size, config.public_batch_size = 1, 16, 16
    config.data.num_examples, config.data.image_size = 600, 32
    config.public.num_examples = 32
    config.model.small = config.model.large = "resnet20"
    config.learning_rate, config.seed = swept["learning_rate"], int(swept["seed"])
    return Run(swept, validate(config))


def main() -> None:
    """Counts the outcomes; the first is made without other work, while most is compiled."""
    times, found = int(sys.argv[1]), set()
    jax.config.update("jax_num_cpu_devices", 2)
    other_work = OtherWork("ours", os.cpu_count() or 1)
    (block,) = blocks([a_run(swept) for swept in SWEPT])
    program = Program(block, "test")

    def outcome() -> str:
        return json.dumps([row for _, rows in program.results() for row in rows])

    found.add(outcome())
    with other_work():
        found.update(outcome() for _ in range(times))
    print(json.dumps({"sweeps": len(found), "runs": len(json.loads(next(iter(found))))}))


if __name__ == "__main__":
    main()
