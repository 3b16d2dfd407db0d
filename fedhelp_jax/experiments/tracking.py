"""Sends the numbers of each round to tracking tools, which all work without a network.

A tool that fails is left out with a warning and never stops a run.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fedhelp_jax.core import distributed
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.typing import Record

_log = logging.getLogger(__name__)

_PROJECT = "fedhelp_jax"


class _Tool(NamedTuple):
    """A tool that was opened for a run: ``log(values, round)`` and ``close()``."""

    log: Callable[[Mapping[str, float], int], Any]
    close: Callable[[], Any]


def _tensorboard(workdir: Path, settings: Record) -> _Tool:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(workdir / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {key} = {v}" for key, v in settings.items()))

    def log(values: Mapping[str, float], round: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, round)

    return _Tool(log, writer.close)


def _wandb(workdir: Path, settings: Record) -> _Tool:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(
        project=_PROJECT,
        name=workdir.name,
        dir=str(workdir),
        mode=os.environ.get("WANDB_MODE", "offline"),
        config=dict(settings),
        settings=wandb.Settings(silent=True),
    )
    return _Tool(lambda values, round: run.log(dict(values), step=round), run.finish)


def _mlflow(workdir: Path, settings: Record) -> _Tool:
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    local = f"sqlite:///{workdir.resolve() / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", local))
    found = client.get_experiment_by_name(_PROJECT)
    experiment = found.experiment_id if found else client.create_experiment(_PROJECT)
    run = client.create_run(experiment, run_name=workdir.name).info.run_id
    for key, value in settings.items():
        client.log_param(run, key, value)

    def log(values: Mapping[str, float], round: int) -> None:
        for name, value in values.items():
            client.log_metric(run, name, value, step=round)

    return _Tool(log, lambda: client.set_terminated(run))


def _trackio(workdir: Path, settings: Record) -> _Tool:
    import trackio  # pyright: ignore[reportMissingImports]

    run = trackio.init(project=_PROJECT, name=workdir.name, config=dict(settings))
    return _Tool(lambda values, round: run.log(dict(values), step=round), trackio.finish)


# The package that each needs, and how it is opened.
TOOLS: Mapping[str, tuple[str, Callable[[Path, Record], _Tool]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
    "trackio": ("trackio", _trackio),
}


class Tracking:
    """The tracking tools of a run; a context manager."""

    def __init__(self, names: Sequence[str], workdir: Path, settings: Record):
        """Checks that the tools are installed; opens none.

        Args:
          names: Names of `TOOLS`.
          workdir: The run folder.
          settings: The settings of the run, by their dotted keys.

        Raises:
          UserError: If one is not installed.
        """
        for name in names:
            if find_spec(TOOLS[name][0]) is None:
                raise UserError(
                    f"config.tracking: {name} needs the package {TOOLS[name][0]}, which is not "
                    f"installed: pip install 'fedhelp_jax[{name}]'"
                )
        self._names = names if distributed.is_coordinator() else ()
        self._workdir = workdir
        self._settings = {key: str(value) for key, value in settings.items()}
        self._tools: dict[str, _Tool] = {}

    def __enter__(self) -> "Tracking":
        """Opens the tools."""
        for name in self._names:
            tool = _tried(name, lambda n=name: TOOLS[n][1](self._workdir, self._settings))
            if tool is not None:
                self._tools[name] = tool
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the tools."""
        for name, tool in self._tools.items():
            _tried(name, tool.close)

    def log(self, row: Record) -> None:
        """Sends the numbers of a row of ``metrics.jsonl``, under names such as train/small/loss."""
        values = dict(_numbers(row))
        for name, tool in list(self._tools.items()):
            if _tried(name, lambda t=tool: (t.log(values, row["round"]),)) is None:
                del self._tools[name]


def _tried(name: str, do: Callable[[], Any]) -> Any:
    """Returns the result of a tool's call, or None with a warning if it fails."""
    try:
        return do()
    except Exception as error:  # whatever a tool raises, the run goes on
        _log.warning("config.tracking: %s: %s: %s", name, type(error).__name__, error)
        return None


def _numbers(row: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "round":
            yield f"{prefix}{key}", float(value)
