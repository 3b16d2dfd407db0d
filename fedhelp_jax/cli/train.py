"""``fedhelp train`` and ``fedhelp evaluate``."""

import functools
from collections.abc import Callable
from pathlib import Path

from fedhelp_jax.cli.command import CONFIG, DISTRIBUTED, OUTPUT, Command, Flag, Given, workdir
from fedhelp_jax.cli.process import (
    address,
    complain,
    prepare_jax,
    ready_folder,
    settings_of,
    teach_first,
)
from fedhelp_jax.cli.report import NO_REPORT, write_at_the_end
from fedhelp_jax.typing import Record


def _train(given: Given) -> int:
    from fedhelp_jax.experiments.unused import warn_unused

    config = settings_of(given)
    folder, overwrite = ready_folder(given), bool(given["overwrite"])
    config = prepare_jax(config, None if overwrite else folder)
    from fedhelp_jax.core import distributed
    from fedhelp_jax.experiments import result
    from fedhelp_jax.experiments.stopping import Interrupted
    from fedhelp_jax.teachers.resolve import AnswersMissing

    with distributed.joined(address(given), complain):
        if distributed.is_coordinator():
            warn_unused(config)
        try:
            run = functools.partial(result.run, config, folder, overwrite=overwrite)
            return _shown(lambda: run().summary, given, folder)
        except AnswersMissing as error:
            raise teach_first(error, f"--config={given['config']}", *given.rest) from None
        except Interrupted as stop:
            complain(str(stop) or f"interrupted; the same command goes on from {folder}")
            return 130


def _evaluate(given: Given) -> int:
    from fedhelp_jax.experiments.config_files import load_run
    from fedhelp_jax.report import run_files

    folder = Path(given["workdir"])
    config = load_run(folder / run_files.CONFIG, given.rest)
    prepare_jax(config)
    from fedhelp_jax.core import distributed
    from fedhelp_jax.experiments import runner

    with distributed.joined(address(given), complain):
        return _shown(lambda: runner.evaluate(folder, config), given, folder)


def _shown(run: Callable[[], Record], given: Given, folder: Path) -> int:
    """Prints and reports the results of a run, even if it diverged, and returns the exit code."""
    from fedhelp_jax.core import distributed
    from fedhelp_jax.report import console
    from fedhelp_jax.simulation.divergence import Diverged

    diverged = None
    try:
        summary = run()
    except Diverged as error:  # all processes raise it and must end together
        diverged, summary = error, error.summary
    if distributed.is_coordinator():
        console.print_summary(summary)
        write_at_the_end(given, folder)
    if diverged is None:
        return 0
    complain(str(diverged))
    return 1


TRAIN = Command(
    "train",
    "train the clients of a federation, or go on where a stopped run was saved",
    (
        "fedhelp train --config=configs/quickstart.py --workdir=runs/quickstart",
        "fedhelp train --config=configs/quickstart.py --workdir=runs/fedavg \\\n"
        "    --config.algorithm.name=fedavg --config.seed=3",
    ),
    _train,
    (
        CONFIG,
        workdir("the run folder; a run stopped there goes on", "runs/quickstart"),
        Flag("overwrite", "remove what is in the run folder and begin anew", "switch"),
        NO_REPORT,
        *OUTPUT,
        *DISTRIBUTED,
    ),
    settings=True,
)
EVALUATE = Command(
    "evaluate",
    "measure a trained run again, from its newest checkpoint; data may have been moved",
    (
        "fedhelp evaluate --workdir=runs/quickstart",
        "fedhelp evaluate --workdir=runs/quickstart --config.data.path=FOLDER",
    ),
    _evaluate,
    (workdir("the run folder", "runs/quickstart"), NO_REPORT, *OUTPUT, *DISTRIBUTED),
    settings=True,
)
