"""``fedhelp verdict``."""

from pathlib import Path

from fedhelp_jax.cli.command import OUTPUT, Command, Flag, Given
from fedhelp_jax.cli.process import printed
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.report.verdict.rules import RULES


def _verdict(given: Given) -> int:
    if not given.rest:
        raise UserError("no folder is given; e.g. fedhelp verdict runs/study")
    from fedhelp_jax.experiments.reporting import verdict

    folders = [Path(folder) for folder in given.rest]
    out = Path(given["out"]) if given["out"] else None
    print(f"written: {verdict(folders, given['against'], given['deploys'], out)}")
    return printed()


VERDICT = Command(
    "verdict",
    "tell which hospitals gain over staying alone, which lose, and for which it is unclear",
    (
        "fedhelp verdict runs/miniature",
        "fedhelp verdict runs/demo/fedhelp runs/demo/local --out=runs/demo",
        "fedhelp verdict runs/study --against=fedavg --deploys=best_on_validation",
    ),
    _verdict,
    (
        Flag(
            "against",
            "the method to compare with, as the folders of a study are called: local, which is to "
            "stay alone",
            value="METHOD",
        ),
        Flag("deploys", "what a hospital deploys after the federation", choices=RULES),
        Flag(
            "out",
            "the folder for verdict.csv; the folder itself if only one is given",
            "folder",
            "FOLDER",
        ),
        *OUTPUT,
    ),
    arguments="FOLDER...",
    more=(
        "A hospital that has trained a model of its own (own) may also deploy the one that the "
        "server broadcasts (global), or the better of both on its validation images "
        "(best_on_validation); as_run is the one that the method reports."
    ),
)
