"""Runs from Python: `run`, what it returns, and the same of a finished run folder."""

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
from fedhelp_jax.experiments import runner
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.experiments.runner import Callback
from fedhelp_jax.report import run_files


def run(
    config: "str | Path | ConfigDict | RunConfig",
    workdir: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    overwrite: bool = False,
) -> "Result":
    """Runs, or goes on with, what ``fedhelp train`` runs, and returns its result.

    Args:
      config: A config file, as ``--config`` takes it; or the settings, as `default_config` or
        `load_config` returns them, changed.
      workdir: The run folder; None takes a temporary one, which goes with the result.
      callbacks: Called after every round with its number from 1, its row of ``metrics.jsonl``, and
        the state; the state's arrays must not be kept, since the next round takes over their
        memory. If one returns True, the run ends after that round, and is measured.
      overwrite: Begin anew, removing what an earlier run left in the folder.

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
        runner.train(settings, Path(workdir), overwrite, callbacks=callbacks)
        return Result(Path(workdir))
    folder = Path(tempfile.mkdtemp(prefix="fedhelp_"))
    remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
    try:
        runner.train(settings, folder, callbacks=callbacks)
        result = Result(folder)
    except BaseException:
        remove()
        raise
    weakref.finalize(result, remove)
    return result


def load_run(folder: str | Path) -> "Result":
    """Returns the result of a finished run from its folder.

    Raises:
      UserError: If it is none.
    """
    return Result(Path(folder))


class Table(dict[str, list[Any]]):
    """Columns by name."""

    def to_pandas(self) -> Any:
        """Returns it as a ``pandas.DataFrame``, where pandas is installed."""
        import pandas as pd  # pyright: ignore[reportMissingImports]

        return pd.DataFrame(dict(self))


class Result:
    """A finished run.

    Attributes:
      folder: Its run folder.
      config: Its settings.
      summary: The content of ``summary.json``.
    """

    def __init__(self, folder: Path):
        """Reads the folder."""
        self.folder = folder
        self.summary = run_files.read_summary(folder)
        self.config = configs.load(folder / runner.CONFIG)
        self._restored: Any = None

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}, {self.summary['algorithm']})"

    @property
    def history(self) -> Table:
        """A value for each round: losses, and metrics of rounds that were evaluated, else None."""
        rows = run_files.read_metrics(self.folder / runner.METRICS)
        names = dict.fromkeys(name for row in rows for name in row)
        return Table({name: [row.get(name) for row in rows] for name in names})

    @property
    def clients(self) -> Table:
        """The content of ``clients.csv``: each client's metrics by model and split."""
        with (self.folder / runner.CLIENTS).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = Table({name: [row[name] for row in rows] for name in run_files.CLIENT_COLUMNS})
        columns["value"] = [float(value) if value else None for value in columns["value"]]
        return columns

    def predict(self, images: Any, client: str) -> np.ndarray:
        """Returns the logits of the model that a client deploys.

        The first call reads the run's data and its last checkpoint.

        Args:
          images: ``[n, *spatial, channels]`` of the size that the run trained on: uint8 pixels, or
            floats as they are.
          client: Its name.

        Returns:
          ``[n, C]``, or for masks ``[n, *spatial, C]``.

        Raises:
          UserError: If there is no such client, or the images are of another size.
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
        """Copies the run folder.

        Raises:
          UserError: If there is such a folder.
        """
        if Path(folder).exists():
            raise UserError(f"{folder}: exists; name another folder")
        shutil.copytree(self.folder, folder)

    @staticmethod
    def load(folder: str | Path) -> "Result":
        """Returns the result that `save` wrote; as `load_run`."""
        return Result(Path(folder))
