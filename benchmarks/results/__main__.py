"""Collects a study, or writes the tables and figures of all of them; see the package."""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from benchmarks.results.collect import as_lines, collect
from benchmarks.results.pages import RESULTS, generated
from fedhelp_jax.report.verdict.rules import ALONE

_COLLECT = flags.DEFINE_string("collect", None, "the folder of a study's runs")
_STUDY = flags.DEFINE_string("study", None, "the study's file, as compare was given it")
_AGAINST = flags.DEFINE_string("against", ALONE, "the method that the others are compared with")
_PROCESSOR = flags.DEFINE_string("processor", None, "what the runs were made on")


def main(_: Sequence[str]) -> None:
    """Writes a summary, or what is made from all of them."""
    if _COLLECT.value:
        if not _STUDY.value:
            raise app.UsageError("--collect needs --study")
        folder, command = Path(_COLLECT.value), f"fedhelp compare --study={_STUDY.value}"
        processor = _PROCESSOR.value or "an unnamed processor"
        found = collect(folder, command, processor, _AGAINST.value)
        files = {f"{folder.name}.json": as_lines(found)}
    else:
        files = generated()
    for name, text in files.items():
        (RESULTS / name).write_text(text)
        print(f"written: {RESULTS / name}")


if __name__ == "__main__":
    app.run(main)
