"""``fedhelp report``."""

from pathlib import Path

from fedhelp_jax.cli.command import Command, Flag, Given
from fedhelp_jax.cli.process import printed
from fedhelp_jax.core.errors import UserError

NO_REPORT = Flag("no_report", "write no report.html at the end", "switch")


def folders_and_out(given: Given, example: str) -> tuple[list[Path], Path | None]:
    """Returns the folders to read and, if ``--out`` is given, the one to write to.

    Raises:
      UserError: If no folder is given; the message has a command as an example.
    """
    if not given.rest:
        raise UserError(f"no folder is given; e.g. {example}")
    return [Path(folder) for folder in given.rest], Path(given["out"]) if given["out"] else None


def out_flag(what: str) -> Flag:
    """Returns the flag for the folder to write ``what`` to."""
    about = f"the folder for {what}; the folder itself if only one is given"
    return Flag("out", about, "folder", "FOLDER")


def _report(given: Given) -> int:
    folders, out = folders_and_out(given, "fedhelp report runs/demo/fedhelp")
    from fedhelp_jax.experiments.reporting import report

    print(report(folders, out))
    return printed()


def write_at_the_end(given: Given, folder: Path) -> None:
    """Writes the report of what a command made, unless ``--no_report`` is given, and says so."""
    if given["no_report"]:
        return
    from fedhelp_jax.experiments.reporting import report_at_the_end

    page = report_at_the_end(folder)
    if page is not None:
        print(f"report: {page}", flush=True)


REPORT = Command(
    "report",
    "write report.html, one page about a run, several runs, a study or a sweep",
    (
        "fedhelp report runs/demo/fedhelp",
        "fedhelp report runs/demo/fedhelp runs/demo/local --out=runs/demo",
    ),
    _report,
    (out_flag("report.html and its figures"),),
    arguments="FOLDER...",
)
