"""Running from Python: `run`, its `Result`, and `load_run` for finished run folders."""

import csv
import functools
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments import reporting, runner
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.experiments.runner import Callback
from fedhelp_jax.report import run_files
from fedhelp_jax.report.predictions import PREDICTIONS, read_predictions
from fedhelp_jax.typing import Record


def run(
    config: "str | Path | ConfigDict | RunConfig",
    workdir: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    overwrite: bool = False,
) -> "Result":
    """Starts or resumes a run, like ``fedhelp train``, and returns its result.

    Args:
      config: A config file, as ``--config`` takes it, or settings based on what `default_config`
        or `load_config` returns.
      workdir: The run folder; None uses a temporary folder, which is deleted with the result.
      callbacks: Called after every round with its number, starting at 1, its row of
        ``metrics.jsonl``, and the state. Do not keep the state's arrays, since the next round
        reuses their memory. If a callback returns True, the run ends after that round and is
        evaluated.
      overwrite: Whether to start from scratch and remove an earlier run from the folder.

    Raises:
      UserError: If the settings, the data or the folder do not allow the run.
      Diverged: If every client of a role has diverged; the folder holds the results.

    Example:
      A run of three rounds that prints the loss of each::

        config = fh.load_config("configs/quickstart.py")
        config.rounds = 3
        result = fh.run(config, callbacks=[lambda round, row, state: print(round, row["loss"])])
        result.clients["value"]
    """
    if isinstance(config, RunConfig):
        settings = config
    elif isinstance(config, ConfigDict):
        settings = configs.validate(config)
    else:
        settings = read_settings(str(config), [])
    if workdir is not None:
        summary = runner.train(settings, Path(workdir), overwrite, callbacks=callbacks)
        return Result(Path(workdir), settings, summary)
    folder = Path(tempfile.mkdtemp(prefix="fedhelp_"))
    remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
    try:
        result = Result(folder, settings, runner.train(settings, folder, callbacks=callbacks))
    except BaseException:
        remove()
        raise
    weakref.finalize(result, remove)
    return result


def load_run(folder: str | Path) -> "Result":
    """Returns the result of a finished run from its folder.

    Raises:
      UserError: If the folder does not hold a finished run.
    """
    folder = Path(folder)
    summary = run_files.read_summary(folder)
    return Result(folder, configs.load(folder / run_files.CONFIG), summary)


class Table(dict[str, list[Any]]):
    """A table: a dict of columns by name."""

    def to_pandas(self) -> Any:
        """Returns the table as a ``pandas.DataFrame``; pandas must be installed."""
        import pandas as pd  # pyright: ignore[reportMissingImports]

        return pd.DataFrame(dict(self))


class Result:
    """The result of a finished run.

    Attributes:
      folder: The run folder.
      config: The settings of the run.
      summary: The content of ``summary.json``; in a run of several processes, empty in all but the
        first.
    """

    def __init__(self, folder: Path, config: RunConfig, summary: Record):
        """Holds what `run` and `load_run` give it."""
        self.folder, self.config, self.summary = folder, config, summary
        self._restored: Any = None

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}, {self.config.algorithm.name})"

    @property
    def history(self) -> Table:
        """The losses and metrics by round; metrics are None in rounds without an evaluation."""
        rows = run_files.read_metrics(self.folder / run_files.METRICS)
        names = dict.fromkeys(name for row in rows for name in row)
        return Table({name: [row.get(name) for row in rows] for name in names})

    @property
    def clients(self) -> Table:
        """The content of ``clients.csv``: the metrics of each client by model and split."""
        with (self.folder / run_files.CLIENTS).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = Table({name: [row[name] for row in rows] for name in run_files.CLIENT_COLUMNS})
        columns["value"] = [float(value) if value else None for value in columns["value"]]
        return columns

    @property
    def predictions(self) -> Table:
        """The content of ``predictions.csv.gz``: the logits of each example, by client and model.

        Raises:
          UserError: If the run saved none, as for masks, or the file is damaged.
        """
        found, classes = read_predictions(self.folder / PREDICTIONS)
        names = ("client", "role", "model", "split", "example", "label")
        table = Table({name: [] for name in (*names, *(f"logit {c}" for c in classes))})
        for p in found:
            for name in names[:4]:
                table[name] += [getattr(p, name)] * len(p.labels)
            table["example"] += p.examples.tolist()
            table["label"] += p.labels.tolist()
            for i, name in enumerate(classes):
                table[f"logit {name}"] += p.logits[:, i].tolist()
        return table

    def report(self, out: str | Path | None = None) -> Path:
        """Writes ``report.html``, a page about the run, and its figures and numbers.

        Args:
          out: The folder to write to; None takes the run folder.

        Returns:
          The path of the page.
        """
        return reporting.report([self.folder], Path(out) if out is not None else self.folder)

    def predict(self, images: Any, client: str) -> np.ndarray:
        """Returns the logits of the model that a client deploys.

        The first call reads the run's data and its last checkpoint.

        Args:
          images: ``[n, *spatial, channels]`` of the size that the run trained on: uint8 pixels, or
            floats, which are used unchanged.
          client: Name of the client.

        Returns:
          ``[n, C]``, or ``[n, *spatial, C]`` for masks.

        Raises:
          UserError: If there is no such client, or the images have another size.
        """
        if self._restored is None:
            self._restored = runner.restore(self.config, self.folder)
        experiment, state = self._restored
        simulation = experiment.simulation
        places = {
            name: (group, row)
            for group in simulation.groups
            for row, name in enumerate(group.names)
        }
        if client not in places:
            known = ", ".join(places)
            raise UserError(f"client {client!r} is not one of {known}{suggest(client, places)}")
        images, shape = np.asarray(images), experiment.dataset.images.shape[1:]
        if images.shape[1:] != shape:
            raise UserError(
                f"images are {list(images.shape[1:])}, but the run was on {list(shape)}"
            )
        return runner.logits_of(*runner.deployed(experiment, state, *places[client]), images)

    def save(self, folder: str | Path) -> None:
        """Copies the run folder to ``folder``.

        Raises:
          UserError: If ``folder`` already exists.
        """
        if Path(folder).exists():
            raise UserError(f"{folder}: exists; name another folder")
        shutil.copytree(self.folder, folder)

    @staticmethod
    def load(folder: str | Path) -> "Result":
        """Returns the result that `save` wrote; the same as `load_run`."""
        return load_run(folder)
