"""``fedhelp verdict``."""

from fedhelp_jax.cli.command import OUTPUT, Command, Flag, Given
from fedhelp_jax.cli.process import printed
from fedhelp_jax.cli.report import folders_and_out, out_flag
from fedhelp_jax.report.verdict.rules import RULES


def _verdict(given: Given) -> int:
    folders, out = folders_and_out(given, "fedhelp verdict runs/study")
    from fedhelp_jax.experiments.reporting import verdict

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
        out_flag("verdict.csv"),
        *OUTPUT,
    ),
    arguments="FOLDER...",
    more=(
        "A hospital that has trained a model of its own (own) may also deploy the one that the "
        "server broadcasts (global), or the better of both on its validation images "
        "(best_on_validation), also among models between both if the run had config.interpolate "
        "(interpolated); as_run is the one that the method reports. With guarded, it stays "
        "alone unless its validation images, read beside those of all others, speak for joining."
    ),
)
