"""``fedhelp report``."""

from pathlib import Path

from fedhelp_jax.cli.command import Command, Flag, Given
from fedhelp_jax.cli.process import printed
from fedhelp_jax.core.errors import UserError

NO_REPORT = Flag("no_report", "write no report.html at the end", "switch")


def _report(given: Given) -> int:
    if not given.rest:
        raise UserError("no folder is given; e.g. fedhelp report runs/demo/fedhelp")
    from fedhelp_jax.experiments.reporting import report

    folders = [Path(folder) for folder in given.rest]
    out = Path(given["out"]) if given["out"] else None
    print(report(folders, out))
    return printed()


def write_at_the_end(given: Given, folder: Path) -> None:
    """Writes the report of what a command made, unless ``--no-report`` is given, and says so."""
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
    (
        Flag(
            "out",
            "the folder for report.html and its figures; the folder itself if only one is given",
            "folder",
            "FOLDER",
        ),
    ),
    arguments="FOLDER...",
)
