"""The record of a sweep's finished runs: one line per run, in one file per process."""

import json
from collections.abc import Sequence
from pathlib import Path

from fedhelp_jax.core import distributed
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.experiment import load_sources
from fedhelp_jax.experiments.identity import refuse_other_sources, sources
from fedhelp_jax.report import run_files
from fedhelp_jax.typing import JsonObject, Record


def lines_file(workdir: Path, process: int) -> Path:
    """Returns the file that one process writes its lines to."""
    return workdir / (f"runs.{process}.jsonl" if process else "runs.jsonl")


def finished_runs(workdir: Path, split: str) -> dict[str, JsonObject]:
    """Returns the lines of finished runs measured on ``split``, by fingerprint.

    The result is the same in all processes. An incomplete last line is removed from its file, so
    the caller must hold the folder's lock.

    Raises:
      UserError: If a line is not a line of a sweep.
    """

    def found() -> str:
        # Other processes may see an older state of the shared folder.
        return json.dumps(_finished(workdir, split)) if distributed.is_coordinator() else ""

    return json.loads(distributed.all_gather_text(distributed.run_on_all(found))[0])


def _finished(workdir: Path, split: str) -> dict[str, JsonObject]:
    found: dict[str, JsonObject] = {}
    for path in sorted(workdir.glob("runs*.jsonl")):
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        for number, row in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(row)
                if line["split"] == split:
                    found[line["fingerprint"]] = line
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}: line {number} is not a line of a sweep") from None
            if "sources" not in line:
                raise UserError(
                    f"{path}: its runs are of an earlier version of fedhelp_jax, which did not "
                    "record what a run reads; name another folder"
                )
        if whole != text:
            run_files.write_text(path, whole)
    return found


def refuse_other_data(finished: Sequence[tuple[RunConfig, Record]], workdir: Path) -> None:
    """Refuses to add runs to finished runs that have read different data.

    Each combination of sources is read only once.

    Args:
      finished: The settings and the line of each finished run.
      workdir: The folder of the sweep, for the message.

    Raises:
      UserError: If the content of a source has changed.
    """

    def check() -> None:
        seen: dict[str, JsonObject] = {}
        for config, line in finished if distributed.is_coordinator() else ():
            read = config.task, config.seed, config.data, config.public, config.teacher
            key = repr((*read, config.algorithm.name))
            if key not in seen:
                seen[key] = sources(config, *load_sources(config))
            refuse_other_sources(line["sources"], seen[key], f"--workdir={workdir}")

    distributed.run_on_all(check)
