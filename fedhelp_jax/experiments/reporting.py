"""Reports on runs, studies and sweeps (`fedhelp_jax.report`): the page, and the verdict."""

import logging
from collections.abc import Sequence
from pathlib import Path

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.core.storage import StorageError
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.report import run_files
from fedhelp_jax.report.page.build import write_report
from fedhelp_jax.report.run_data import find_runs, read_runs
from fedhelp_jax.report.tables import print_grid
from fedhelp_jax.report.verdict import told
from fedhelp_jax.report.verdict.judge import judge
from fedhelp_jax.report.verdict.rules import ALONE

_log = logging.getLogger(__name__)


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes ``report.html`` and the folder ``report`` about runs.

    Args:
      folders: Folders of runs, studies or sweeps. Runs may be unfinished or damaged; the page says
        what is missing.
      out: The folder to write to; None takes the folder itself if there is only one.

    Returns:
      The path of the page, which is self-contained.

    Raises:
      UserError: If there is no run in the folders, or several folders but no ``out``.
    """
    return write_report(folders, _target(folders, out, "the report"), changed=_changed)


def verdict(
    folders: Sequence[Path], against: str | None, rule: str, out: Path | None = None
) -> Path:
    """Prints which hospitals gain over an alternative and which lose, and writes ``verdict.csv``.

    Args:
      folders: Folders of runs or studies.
      against: Label of the alternative; None takes `ALONE`.
      rule: What a hospital deploys, one of `fedhelp_jax.report.verdict.rules.RULES`.
      out: The folder to write to; None takes the folder itself if there is only one.

    Returns:
      The path of the table.

    Raises:
      UserError: If there are no two finished runs to compare, or several folders but no ``out``.
    """
    against = against or ALONE
    path = _target(folders, out, told.VERDICT) / told.VERDICT
    runs = read_runs(find_runs(folders), folders)
    labels = list(dict.fromkeys(run.label for run in runs))
    if against not in labels:
        raise UserError(
            f"--against={against}: no run is of that method; there are {', '.join(labels)}"
            f"{suggest(against, labels)}"
        )
    verdicts = judge(runs, against, rule)
    if not verdicts:
        raise UserError(
            f"no method has a finished run with predictions on the data and seed of a run of "
            f"{against}"
        )
    for grid in told.grids(verdicts, against):
        print_grid(grid)
    told.write_verdicts(path, verdicts, against, rule)
    return path


def _target(folders: Sequence[Path], out: Path | None, what: str) -> Path:
    """Returns the folder to write to.

    Raises:
      UserError: If there are several folders but no ``out``.
    """
    if out is None and len(folders) != 1:
        raise UserError(f"several folders are given: name the folder for {what} by --out")
    return out or folders[0]


def report_at_the_end(folder: Path) -> Path | None:
    """Writes the report of what a command has made; a failure is a warning.

    Returns:
      The path of the page, or None if it could not be made.

    Raises:
      StorageError: If the disk does not take it.
    """
    try:
        return report([folder])
    except StorageError:
        raise
    except Exception as error:  # the results are written; a page about them must not fail the run
        _log.warning("no report: %s: %s", type(error).__name__, error)
        return None


def _changed(folder: Path) -> list[tuple[str, str, str]]:
    """Returns (key, value, default) of each setting of a run that is not the default."""
    try:
        config = configs.load(folder / run_files.CONFIG)
    except UserError:
        return []
    ours, theirs = (dict(configs.flat(configs.to_dict(c))) for c in (config, _default(config)))
    return [
        (key.replace("algorithm.settings.", "algorithm."), str(value), str(theirs.get(key, "")))
        for key, value in ours.items()
        if value != theirs.get(key)
    ]


def _default(config: RunConfig) -> RunConfig:
    """Returns the default settings of the same method, if it can run with them."""
    base = configs.default_config()
    try:
        configs.declare_method(base, config.algorithm.name)
        return configs.validate(base)
    except UserError:
        return RunConfig()
