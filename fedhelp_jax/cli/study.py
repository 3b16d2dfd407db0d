"""``fedhelp compare`` and ``fedhelp tune``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedhelp_jax.cli.command import OUTPUT, STUDY, Command, Given, workdir
from fedhelp_jax.cli.process import complain, prepare_jax, ready_folder, teach_first
from fedhelp_jax.cli.report import NO_REPORT, write_at_the_end
from fedhelp_jax.core.errors import UserError

if TYPE_CHECKING:
    from fedhelp_jax.experiments.study import Study  # imports JAX


def _compare(given: Given) -> int:
    def compare(study: "Study", folder: Path) -> None:
        from fedhelp_jax.experiments import study as studies

        try:
            studies.compare(study, folder)
        finally:  # the runs that failed are missing in the table, and so they are on the page
            write_at_the_end(given, folder)

    return _with_study(given, compare)


def _tune(given: Given) -> int:
    def tune(study: "Study", folder: Path) -> None:
        from fedhelp_jax.experiments import study as studies

        if not study.grids:
            raise UserError("the study has no grids, so there is nothing to tune")
        _, failures = studies.tune(study, folder)
        if failures:
            raise studies.Failed(failures)
        print(f"written: {folder / 'tuning.csv'}")

    return _with_study(given, tune)


def _with_study(given: Given, do: Callable[["Study", Path], None]) -> int:
    from fedhelp_jax.experiments.config_files import load_study

    study = load_study(given["study"])
    folder = ready_folder(given)
    from fedhelp_jax.experiments.study import first_config, stopped_run

    prepare_jax(first_config(study), stopped_run(folder))
    from fedhelp_jax.experiments.stopping import Interrupted
    from fedhelp_jax.experiments.study import Failed
    from fedhelp_jax.teachers.resolve import AnswersMissing

    try:
        do(study, folder)
    except Failed as failed:
        if not any(isinstance(error, AnswersMissing) for _, error in failed.failures):
            raise
        raise teach_first(failed, f"--study={given['study']}") from None
    except Interrupted as stop:
        complain(str(stop))
        return 130
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on with the runs that are missing")
        return 130
    return 0


COMPARE = Command(
    "compare",
    "make the runs of a study that are missing, and one table of all: methods, data, seeds",
    ("fedhelp compare --study=configs/studies/miniature.py --workdir=runs/miniature",),
    _compare,
    (STUDY, workdir("the folder of the study", "runs/miniature"), NO_REPORT, *OUTPUT),
)
TUNE = Command(
    "tune",
    "make only the trials of a study, on validation images; compare makes them too",
    ("fedhelp tune --study=configs/studies/baselines.py --workdir=runs/baselines",),
    _tune,
    (STUDY, workdir("the folder of the study", "runs/baselines"), *OUTPUT),
)
