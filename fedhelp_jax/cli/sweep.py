"""``fedhelp sweep``."""

import ast
import itertools
from typing import Any

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
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.terminal import tell

_MOST_RUNS = 100_000


def _sweep(given: Given) -> int:
    axes = dict(_axis(text) for text in given["sweep"] or [])
    from fedhelp_jax.experiments.unused import refuse_unused

    base = settings_of(given)
    seeds = _seeds(given["seeds"]) if given["seeds"] else [base.seed]
    if not axes and len(seeds) == 1:
        raise UserError("--sweep is missing; e.g. --sweep=learning_rate=1e-4,1e-3")
    points = [
        (dict(zip(axes, values, strict=True)), seed)
        for values in itertools.product(*axes.values())
        for seed in seeds
    ]
    found = []
    for point, seed in points:
        own = [f"--config.{key}={value}" for key, value in point.items()]
        config = settings_of(given, [*own, f"--config.seed={seed}"])
        refuse_unused(config, point, by_method=True)
        found.append(({**{key: _literal(v) for key, v in point.items()}, "seed": seed}, config))
    folder = ready_folder(given)
    prepare_jax(base)
    from fedhelp_jax.core import distributed
    from fedhelp_jax.experiments.sweep import sweep
    from fedhelp_jax.experiments.sweep_blocks import Run
    from fedhelp_jax.report.sweeps import best_settings
    from fedhelp_jax.report.tables import print_grid
    from fedhelp_jax.teachers.resolve import AnswersMissing

    with distributed.joined(address(given), complain):
        try:
            table = sweep(
                [Run(swept, config) for swept, config in found],
                folder,
                split=given["split"],
                runs_at_once=given["runs_at_once"],
                say=tell if distributed.is_coordinator() else lambda text: None,
            )
        except AnswersMissing as error:
            raise teach_first(error, f"--config={given['config']}", *given.rest) from None
        if distributed.is_coordinator():
            if axes:
                print_grid(best_settings(table, list(axes)))
            print(f"written: {folder / 'runs.csv'}")
            write_at_the_end(given, folder)
    return 0


def _axis(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not found:
        raise UserError(f"--sweep={text}: must be KEY=VALUE,VALUE; e.g. learning_rate=1e-4,1e-3")
    if key == "seed":
        raise UserError(f"--sweep={text}: seeds have a flag of their own; e.g. --seeds=0:4")
    return key, found


def _seeds(text: str) -> list[int]:
    try:
        if ":" in text:
            first, end = map(int, text.split(":"))
            seeds = range(first, min(end, first + _MOST_RUNS + 1))
        else:
            seeds = list(map(int, text.split(",")))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(seeds) > _MOST_RUNS or len(set(seeds)) < len(seeds):
        raise UserError(
            f"--seeds={text}: must be FIRST:END or N,N,..., at most {_MOST_RUNS:,}; e.g. 0:4 or "
            "1,5,7"
        )
    return list(seeds)


def _literal(text: str) -> Any:
    """Returns the Python literal in ``text``, such as a number, for the table; else ``text``."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


SWEEP = Command(
    "sweep",
    "make many runs that differ in a few settings and seeds, as one compiled program",
    (
        "fedhelp sweep --config=configs/quickstart.py --workdir=runs/sweep \\\n"
        "    --sweep=learning_rate=1e-4,1e-3 --sweep=algorithm.lambda_b=0,0.2 --seeds=0:4",
    ),
    _sweep,
    (
        CONFIG,
        workdir("the folder of the sweep; what is finished there is not run again", "runs/sweep"),
        Flag(
            "sweep",
            "a setting and its values; if it is given more than once, every combination is run",
            "many",
            "KEY=VALUE,VALUE",
        ),
        Flag(
            "seeds",
            "0:4 is 0, 1, 2, 3; the config's own seed if left out",
            value="FIRST:END|N,N...",
        ),
        Flag(
            "split",
            "what is measured: validation, to choose by, or test",
            choices=("validation", "test"),
        ),
        Flag(
            "runs_at_once",
            "runs that a device vectorises; the back end's best if left out",
            "number",
            "N",
            least=1,
        ),
        NO_REPORT,
        *OUTPUT,
        *DISTRIBUTED,
    ),
    settings=True,
)
