"""Reads everything that a run folder holds, and notes what is missing instead of failing."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.report import run_files
from fedhelp_jax.report.client_distribution import SHARES
from fedhelp_jax.report.dice import DICE, ExampleDice, read_dice
from fedhelp_jax.report.predictions import PREDICTIONS, Predictions, read_predictions
from fedhelp_jax.report.run_files import CLIENTS, CONFIG, METRICS, SUMMARY
from fedhelp_jax.typing import JsonObject, Record

_MARKS = (CONFIG, METRICS, SUMMARY)


class RunData(NamedTuple):
    """The content of a run folder, as far as it could be read.

    Attributes:
      folder: The folder.
      label: What the run is called beside others: its method, unless several runs have the same.
      config: Content of ``config.json``.
      summary: Content of ``summary.json``; empty if the run is not finished.
      history: Rows of ``metrics.jsonl``.
      clients: Rows of ``clients.csv``.
      shares: Rows of ``shares.csv``.
      left_out: Rows of ``quarantine.csv``.
      provenance: Content of ``provenance.json``.
      predictions: Content of ``predictions.csv.gz``.
      classes: Names of the classes in the predictions.
      dice: Content of ``dice.csv``, for masks.
      missing: A sentence about each file that is missing or damaged.
      place: In a study, the folder of the run's data set; else empty.
    """

    folder: Path
    label: str
    config: JsonObject
    summary: JsonObject
    history: list[JsonObject]
    clients: list[Record]
    shares: list[Record]
    left_out: list[Record]
    provenance: JsonObject
    predictions: list[Predictions]
    classes: list[str]
    dice: list[ExampleDice]
    missing: list[str]
    place: str = ""

    @property
    def dataset(self) -> str:
        """Name of the private data set; "?" if unknown."""
        return str(
            self.summary.get("dataset") or (self.config.get("data") or {}).get("name") or "?"
        )

    @property
    def seed(self) -> int | None:
        """The seed; None if unknown."""
        return self.summary.get("seed", self.config.get("seed"))

    @property
    def metric(self) -> str:
        """The headline metric; "?" if unknown."""
        rows = (row["metric"] for row in reversed(self.history) if row.get("metric"))
        return str(self.summary.get("metric") or next(rows, "?"))

    def worst_first(self) -> list[JsonObject]:
        """Returns the entries of the clients that have the headline metric, the worst first."""
        found = self.summary.get("per_client") or []
        known = [c for c in found if (c.get("metrics") or {}).get(self.metric) is not None]
        return sorted(known, key=lambda c: c["metrics"][self.metric])


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds any of the files of a run."""
    return any((folder / name).exists() for name in _MARKS)


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Returns the run folders in folders, at any depth; a folder itself if it is one.

    The trials by which a study tunes are left out.
    """
    return list(dict.fromkeys(run for folder in folders for run in _runs_in(folder)))


def _runs_in(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    found = {path.parent for name in _MARKS for path in folder.rglob(name)}
    return sorted(run for run in found if not re.fullmatch(r"trial\d+", run.name))


def read_run(folder: Path) -> RunData:
    """Returns what a run folder holds."""
    missing: list[str] = []

    def read(name: str, parse: Callable[[Path], Any], default: Any, optional: bool = False) -> Any:
        path = folder / name
        if not path.exists():
            if not optional:
                missing.append(f"{name} is missing.")
            return default
        try:
            return parse(path)
        except (UserError, OSError, ValueError) as error:
            missing.append(f"{name} is damaged: {error}.")
            return default

    config = read(CONFIG, _json, {})
    history = read(METRICS, run_files.read_metrics, [])
    summary = read(SUMMARY, _json, {}, optional=True)
    if not summary and not missing:
        done, asked = _last(history), config.get("rounds", "?")
        more = ", but the run is not evaluated" if done == asked else ""
        missing.append(f"The run is not finished: {done} of {asked} rounds are done{more}.")
    finished = bool(summary)
    clients = read(CLIENTS, _csv, [], optional=not finished)
    masks = str(summary.get("metric", "")).startswith("dice")
    keeps = finished and not masks
    has_dice = finished and masks and summary.get("split") == "test"
    predictions, classes = read(PREDICTIONS, read_predictions, ([], []), optional=not keeps)
    method = summary.get("algorithm") or (config.get("algorithm") or {}).get("name") or "?"
    return RunData(
        folder,
        str(method),
        config,
        summary,
        history,
        clients,
        read(SHARES[0], _csv, [], optional=not finished),
        read("quarantine.csv", _csv, [], optional=True),
        read("provenance.json", _json, {}, optional=not finished),
        predictions,
        classes,
        read(DICE, read_dice, [], optional=not has_dice),
        missing,
    )


def read_runs(found: Sequence[Path], folders: Sequence[Path]) -> list[RunData]:
    """Returns the runs that `find_runs` found in folders, with labels that tell them apart.

    Raises:
      UserError: If there is none.
    """
    if not found:
        named = ", ".join(map(str, folders))
        raise UserError(f"{named}: holds no run, which has a {' or '.join(_MARKS)}")
    root = folders[0].resolve() if len(folders) == 1 else None
    return labelled([read_run(run) for run in found], root)


class SweepData(NamedTuple):
    """The table of a sweep.

    Attributes:
      folder: The folder of the sweep.
      swept: Names of the columns that were swept; "seed" is one of them.
      rows: The runs.
    """

    folder: Path
    swept: list[str]
    rows: list[Record]


def read_sweep(folder: Path) -> SweepData | None:
    """Returns the table of a sweep; None if the folder holds none.

    Raises:
      UserError: If the table is damaged.
    """
    path = folder / "runs.csv"
    if not path.exists() or not any(folder.glob("runs*.jsonl")):
        return None
    try:
        rows = _csv(path)
        columns = list(rows[0])
        return SweepData(folder, columns[: columns.index("split")], rows)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: is not the table of a sweep ({error})") from None


def labelled(runs: list[RunData], root: Path | None) -> list[RunData]:
    """Returns runs with distinct labels for distinct settings.

    In a study, the folders ``root / data set / method / seedN`` name the method and the data set.
    Elsewhere, runs of one method that have the same data and seed are called by their folders,
    without a last part such as "seed3", as seen from ``root`` if there is one folder of all.
    """
    if root is not None:
        parts = [run.folder.resolve().relative_to(root).parts for run in runs]
        if all(len(own) > 2 and re.fullmatch(r"seed\d+", own[-1]) for own in parts):
            return [
                run._replace(label=own[-2], place="/".join(own[:-2]))
                for run, own in zip(runs, parts, strict=True)
            ]
    keys = [(run.label, run.dataset, run.seed) for run in runs]
    if len(set(keys)) == len(keys):
        return runs

    def of(run: RunData) -> str:
        path = run.folder.resolve()
        parts = path.relative_to(root).parts if root is not None else path.parts[-2:]
        kept = [part for part in parts if not re.fullmatch(r"seed\d+", part)]
        return "/".join(kept) or path.name

    return [run._replace(label=of(run)) for run in runs]


def _last(history: list[JsonObject]) -> int:
    return int(history[-1]["round"]) if history else 0


def _json(path: Path) -> JsonObject:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it must be a JSON object")
    return found


def _csv(path: Path) -> list[Record]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
