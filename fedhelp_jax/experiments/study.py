"""Studies: one run for each method x data set x budget x seed, all in one folder.

``WORKDIR/<data set>/<method>/seed<N>`` is a run folder like any other. Finished runs are not run
again and stopped runs are resumed. The same command on the same folder therefore resumes a study
where it stopped, and ends with the same table.

Every method gets the same data, rounds, local epochs and batches: a study may change only the
settings in `METHOD_SETTINGS` for one method. If it tunes, every method gets the same number of
trials. They are judged on the clients' validation images; no test image is used.
"""

import dataclasses
import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.core.locks import folder_lock
from fedhelp_jax.core.storage import StorageError, storage_errors
from fedhelp_jax.core.terminal import tell
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments import identity, runner
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.stopping import Interrupted
from fedhelp_jax.experiments.teach import teach as teach_run
from fedhelp_jax.experiments.unused import refuse_unused
from fedhelp_jax.report import run_files
from fedhelp_jax.report.comparison import Result, write_comparison
from fedhelp_jax.report.console import duration
from fedhelp_jax.report.summary import group_summary, has_diverged, mean_of_roles
from fedhelp_jax.simulation.divergence import Diverged
from fedhelp_jax.teachers.resolve import is_asked, members
from fedhelp_jax.typing import JsonObject

Settings = Mapping[str, Any]

# The settings, or groups of settings, that may differ between methods.
METHOD_SETTINGS = (
    "algorithm",
    "client_weights",
    "learning_rate",
    "learning_rate_schedule",
    "model",
    "optimizer",
    "public",
    "roles",
    "server",
    "teacher",
    "weight_decay",
)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, as returned by a study file's ``get_study()``.

    Attributes:
      datasets: Name -> settings, based on `default_config`, or a config file, as ``--config`` takes
        it, relative to the study file.
      methods: Label -> settings that the method changes, by dotted key. ``algorithm.name`` defaults
        to the label.
      seeds: Seeds, with one run each; the seed also determines how data is split among clients.
      budgets: Name -> settings that it changes in all runs, by dotted key, such as ``{"20 rounds":
        {"rounds": 20}}``; the name is appended to the data set's name.
      reference: Label of the method that the others are tested against.
      grids: Label -> {dotted key: values to try}. If empty, nothing is tuned. Otherwise every
        method must have a grid, because tuning only some is not a fair comparison. The grid of a
        method with nothing to tune may be empty.
      trials: Number of grid points that are tried for each method and data set; if the grid is
        larger, they are drawn at random.
      tuning_seed: Seed of the trials, which must not be in `seeds`.
    """

    datasets: Mapping[str, Any]
    methods: Mapping[str, Settings]
    seeds: Sequence[int] = (0, 1, 2)
    budgets: Mapping[str, Settings] = dataclasses.field(default_factory=lambda: {"": {}})
    reference: str = "fedhelp"
    grids: Mapping[str, Mapping[str, Sequence[Any]]] = dataclasses.field(default_factory=dict)
    trials: int = 8
    tuning_seed: int = 1000


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study."""

    dataset: str
    budget: str
    method: str
    seed: int
    config: RunConfig
    folder: Path
    trial: int | None = None

    def __str__(self) -> str:
        what = f"seed {self.seed}" if self.trial is None else f"trial {self.trial}"
        return f"{self.dataset}, {self.method}, {what}"


class Failed(UserError):
    """Some runs of a study failed; the others are finished.

    Attributes:
      failures: The failed runs, with their errors.
    """

    def __init__(self, failures: "Failures"):
        self.failures = failures
        super().__init__(f"runs failed ({len(failures)}): {'; '.join(_reasons(failures))}")


Failures = list[tuple[Cell, Exception]]


def compare(study: Study, workdir: Path) -> None:
    """Makes the missing trials and runs, then prints the comparison and writes it to `workdir`.

    Raises:
      UserError: If the study is invalid, or a folder holds a different run.
      Failed: If some runs failed; the table then lacks them.
      Interrupted: After SIGINT or SIGTERM, once the current run is saved.
    """
    with folder_lock(workdir):
        _compare(study, workdir)


def _compare(study: Study, workdir: Path) -> None:
    chosen, failures = _tune(study, workdir)
    cells = list(_cells(study, workdir, chosen))
    wanted = [cell for cell in cells if not study.grids or (cell.dataset, cell.method) in chosen]
    failures += _run_missing(wanted)
    results = _results(study, cells, [cell for cell in wanted if _is_done(cell)])
    if results:
        write_comparison(results, list(study.methods), study.reference, workdir)
    if failures:
        raise Failed(failures)


def tune(study: Study, workdir: Path) -> tuple[dict[tuple[str, str], Settings], Failures]:
    """Runs the missing trials and chooses each method's settings on each data set.

    A trial's score is the mean, over the two roles, of the role's mean headline metric on its
    clients' *validation* images after the last round. Ties are resolved in favour of the first
    trial. A trial that has diverged has no score. All trials are written to ``tuning.csv``.

    Returns:
      ``{(data set, method): {dotted key: value}}``, empty if the study has no grids, and the trials
      that failed, with their errors. A method with a failed trial has no entry for that data set.

    Raises:
      UserError: If the study is invalid, or no client has validation images.
      Interrupted: After SIGINT or SIGTERM, once the current trial is saved.
    """
    with folder_lock(workdir):
        return _tune(study, workdir)


def _tune(study: Study, workdir: Path) -> tuple[dict[tuple[str, str], Settings], Failures]:
    trials = dict(_trials(study, workdir))
    list(_cells(study, workdir, {}))  # report errors in the runs before making any trial
    failures = _run_missing([cell for cells in trials.values() for cell, _ in cells])
    chosen, rows = {}, []
    for (dataset, method), cells in trials.items():
        if not cells:
            chosen[dataset, method] = {}  # it has nothing to tune
            continue
        if not all(_is_done(cell) for cell, _ in cells):
            continue  # without all of its trials, a method is left out on this data set
        summaries = [run_files.read_summary(cell.folder) for cell, _ in cells]
        scores = [mean_of_roles(summary) for summary in summaries]
        best = None
        if not all(math.isnan(score) for score in scores):
            best = int(np.nanargmax(scores))
            chosen[dataset, method] = cells[best][1]
        elif any(map(has_diverged, summaries)):
            reason = UserError("every trial has diverged; put lower learning rates into its grid")
            failures.append((cells[0][0], reason))
        else:
            raise UserError(
                f"tuning: no client of {dataset} has validation images to judge by; raise "
                "data.validation_fraction"
            )
        rows += [
            {
                "data": dataset,
                "method": method,
                "trial": cell.trial,
                "settings": " ".join(f"{key}={value}" for key, value in point.items()),
                "validation": score,
                "diverged": int(has_diverged(summary)),
                "chosen": int(number == best),
            }
            for number, ((cell, point), score, summary) in enumerate(
                zip(cells, scores, summaries, strict=True)
            )
        ]
    if rows:
        run_files.write_csv(workdir / "tuning.csv", list(rows[0]), rows)
    return chosen, failures


def teach(study: Study, *, dry_run: bool = False) -> None:
    """Gets the answers of all foundation models that a study's runs learn from, each only once.

    Raises:
      UserError: If the study is invalid, no model needs to be asked, or
        `fedhelp_jax.experiments.teach.teach` fails.
    """
    # These settings alone determine which images are asked about, and which must not be sent.
    asked = {
        repr((config.data, config.public, config.teacher, config.seed, _reads(config))): config
        for config in _all_configs(study)
        if (config.public.name != "none" or _reads(config))
        and any(map(is_asked, members(config.teacher)))
    }
    if not asked:
        raise UserError("no run of the study has a foundation model that must be asked")
    done: set[Any] = set()
    for config in asked.values():
        teach_run(config, dry_run=dry_run, done=done)


def _reads(config: RunConfig) -> bool:
    """Returns whether a run's method learns from answers about the clients' own images."""
    return ALGORITHMS[config.algorithm.name].reads_answers


def _all_configs(study: Study) -> Iterator[RunConfig]:
    """Yields the settings of all trials and runs; tuning does not change a teacher's answers."""
    for _, cells in _trials(study, Path()):
        yield from (cell.config for cell, _ in cells)
    yield from (cell.config for cell in _cells(study, Path(), {}))


def first_config(study: Study) -> RunConfig:
    """Returns the settings of a study's first run, which determine the number of CPU devices.

    Raises:
      UserError: If the study is invalid.
    """
    return next(_cells(study, Path(), {})).config


def stopped_run(workdir: Path) -> Path | None:
    """Returns the folder of a run of the study that is started but not finished, if any."""
    begun = sorted(path.parent for path in workdir.glob(f"*/*/*/{identity.PROVENANCE}"))
    return next((folder for folder in begun if not (folder / run_files.SUMMARY).exists()), None)


# --- which runs there are -----------------------------------------------------------------------


def _blocks(study: Study) -> Iterator[tuple[str, str, Any]]:
    """Yields the name, budget and settings of each data set at each budget."""
    names = set()
    for (name, base), (budget, changes) in itertools.product(
        study.datasets.items(), study.budgets.items()
    ):
        label = f"{name} {budget}".strip()
        if label in names:
            raise UserError(f"datasets and budgets: {label!r} stands for two of them; rename one")
        names.add(label)
        yield _checked_name("datasets and budgets", label), budget, _changed(base, changes, label)


def _cells(study: Study, workdir: Path, chosen: Mapping[Any, Settings]) -> Iterator[Cell]:
    _check(study)
    for dataset, budget, base in _blocks(study):
        for method in study.methods:
            for seed in study.seeds:
                settings = _settings(study, method, chosen.get((dataset, method), {}))
                config = _configured(base, {**settings, "seed": seed}, f"{dataset}, {method}")
                folder = workdir / dataset / method / f"seed{seed}"
                yield Cell(dataset, budget, method, seed, config, folder)


def _trials(
    study: Study, workdir: Path
) -> Iterator[tuple[tuple[str, str], list[tuple[Cell, Settings]]]]:
    """Yields, for each data set and method, the trials and their grid points."""
    _check(study)
    for dataset, budget, base in _blocks(study):
        if study.grids and base.data.name == "npz_masks":
            raise UserError(
                f"grids: the test images of {dataset} are drawn by the seed (npz_masks), so trials "
                "would be trained and judged on those of other runs; leave grids out"
            )
        for method, grid in study.grids.items():
            cells = []
            points = grid_points(grid, study.trials, method) if grid else []
            for trial, point in enumerate(points):
                settings = {**_settings(study, method, point), "seed": study.tuning_seed}
                config = _configured(base, settings, f"{dataset}, {method}, trial {trial}")
                folder = workdir / dataset / method / f"trial{trial}"
                cell = Cell(dataset, budget, method, study.tuning_seed, config, folder, trial)
                cells.append((cell, point))
            yield (dataset, method), cells


def grid_points(grid: Mapping[str, Sequence[Any]], trials: int, method: str) -> list[Settings]:
    """Returns ``trials`` points of a grid, in its order.

    From a larger grid, the points are drawn at random, always the same ones.

    Raises:
      UserError: If the grid has fewer points.

    Example:
      >>> grid_points({"lr": (0.1, 0.01), "mu": (0, 1)}, 4, "fedprox")[1]
      {'lr': 0.1, 'mu': 1}
    """
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(points) < trials:
        raise UserError(
            f"grids[{method!r}] has {len(points)} points, but every method gets {trials} trials; "
            "add values, or lower trials"
        )
    drawn = np.random.default_rng(0).choice(len(points), trials, replace=False)
    return [points[i] for i in sorted(drawn)]


def _settings(study: Study, method: str, point: Settings) -> JsonObject:
    settings = {"algorithm.name": method, **study.methods[method], **point}
    for key in settings:
        if key.split(".")[0] not in METHOD_SETTINGS:
            raise UserError(
                f"methods[{method!r}]: {key} must be the same for all methods; put it into "
                f"datasets or budgets (a method may change {', '.join(METHOD_SETTINGS)})"
            )
    return settings


def _changed(base: Any, changes: Settings, where: str) -> Any:
    config = base.copy_and_resolve_references()
    for key, value in changes.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = str(error.args[0]).split(" Other fields present")[0]  # a very long list follows
            raise UserError(f"{where}: {key} = {value!r}: {said}") from None
    return config


def _configured(base: Any, changes: Settings, where: str) -> RunConfig:
    try:
        config = configs.validate(_changed(base, changes, where))
        refuse_unused(config, changes, by_method=True)
        return config
    except UserError as error:
        raise UserError(f"{where}: {error}" if where not in str(error) else str(error)) from None


def _check(study: Study) -> None:
    for name, values in (
        ("datasets", study.datasets),
        ("methods", study.methods),
        ("seeds", study.seeds),
        ("budgets", study.budgets),
    ):
        if not values:
            raise UserError(f"{name}: the study has none")
    for name, base in study.datasets.items():
        if not isinstance(base, config_dict.ConfigDict):
            raise UserError(
                f"datasets[{name!r}] must be default_config(), changed, or a config file as text"
            )
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"seeds = {tuple(study.seeds)} must differ from each other")
    for label in study.methods:
        _checked_name("methods", label)
    if study.reference not in study.methods:
        known = suggest(study.reference, study.methods)
        raise UserError(
            f"reference = {study.reference!r} is the method that others are tested against, and "
            f"must be one of methods ({', '.join(study.methods)}){known}"
        )
    if study.grids:
        uneven = set(study.grids) ^ set(study.methods)
        if uneven:
            raise UserError(
                f"grids must name every method and no other, so that all get the same trials; "
                f"see {', '.join(sorted(uneven))}"
            )
        for label, grid in study.grids.items():
            name = study.methods[label].get("algorithm.name", label)
            if not grid and _can_be_tuned(name):
                raise UserError(f"grids[{label!r}] is empty, but {name} can be tuned; add values")
        if study.tuning_seed in study.seeds:
            raise UserError(f"tuning_seed = {study.tuning_seed} must not be one of seeds")
        if study.trials < 1:
            raise UserError(f"trials = {study.trials} must be at least 1")


def _can_be_tuned(name: str) -> bool:
    """Returns whether a method has settings of its own, or a learning rate."""
    if name not in ALGORITHMS:
        return True  # the user's own, or one that is refused later
    method = ALGORITHMS[name]
    return bool(dataclasses.fields(method.settings)) or not method.ignores("learning_rate")


def _checked_name(what: str, name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise UserError(f"{what}: {name!r} must be a name that a folder can have")
    return name


# --- running them -------------------------------------------------------------------------------


def _is_done(cell: Cell) -> bool:
    """Returns whether the run of a cell is finished.

    Raises:
      UserError: If its folder holds a run with different settings.
    """
    config, summary = cell.folder / run_files.CONFIG, cell.folder / run_files.SUMMARY
    if not config.exists():
        return False
    identity.refuse_other_settings(configs.load(config), cell.config, str(cell.folder))
    if not summary.exists():
        return False
    found = run_files.read_summary(cell.folder)
    if found.get("stopped_after") is not None and cell.config.on_divergence == "continue":
        return False
    # A trial counts only if its summary is of validation images.
    return found.get("rounds") == cell.config.rounds and (
        cell.trial is None or found.get("split") == "validation"
    )


def _run_missing(cells: Sequence[Cell], say: Callable[[str], None] = tell) -> Failures:
    """Makes the unfinished runs; returns those that failed, with their errors."""
    missing = [cell for cell in cells if not _is_done(cell)]
    tuning = any(cell.trial is not None for cell in cells)
    what, left_of = ("tuning run", "left for tuning") if tuning else ("run", "left")
    if len(missing) < len(cells):
        say(f"{len(cells) - len(missing)} of {len(cells)} {what}s are finished")
    failures: Failures = []
    started = time.monotonic()
    for number, cell in enumerate(missing):
        left = (time.monotonic() - started) / number * (len(missing) - number) if number else None
        say(
            f"{what} {number + 1} of {len(missing)}: {cell}"
            + ("" if left is None else f"  ({duration(left)} {left_of})")
        )
        run_files.prepare_folder(cell.folder)
        try:
            split = "test" if cell.trial is None else "validation"
            with storage_errors():
                runner.train(cell.config, cell.folder, split=split, tells_plan=False)
        except StorageError:
            raise  # the next run would fail in the same way after its first rounds
        except UserError as error:
            say(f"refused: {error}")
            failures.append((cell, error))
        except Diverged as error:
            say(f"diverged: {error}")  # this is a result too, which the tables show
        except Interrupted:
            raise
        except Exception as error:  # such as out of memory, or a bug: the other runs still count
            traceback.print_exc()
            failures.append((cell, error))
        jax.clear_caches()  # runs share no programs in memory; the next run loads its own from disk
    return failures


def _reasons(failures: Failures) -> list[str]:
    """Returns why runs failed, with each reason listed once."""
    by_reason: dict[str, list[Cell]] = {}
    for cell, error in failures:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        by_reason.setdefault(f"{kind}{error}", []).append(cell)
    return [
        f"{cells[0]}" + (f" and {len(cells) - 1} more" if cells[1:] else "") + f": {reason}"
        for reason, cells in by_reason.items()
    ]


def _results(study: Study, cells: Sequence[Cell], finished: Sequence[Cell]) -> list[Result]:
    """Returns the results of finished runs, with clients grouped as in the reference's runs."""
    reference_roles = {
        cell.dataset: cell.config.roles for cell in cells if cell.method == study.reference
    }
    summaries = [run_files.read_summary(cell.folder) for cell in finished]
    roles: dict[tuple[str, int], dict[str, str]] = {}
    for cell, summary in zip(finished, summaries, strict=True):
        if cell.config.roles == reference_roles[cell.dataset]:
            found = {client["name"]: client["role"] for client in summary["per_client"]}
            roles[cell.dataset, cell.seed] = found
    _check_same_data(finished)
    results = []
    for cell, summary in zip(finished, summaries, strict=True):
        if (cell.dataset, cell.seed) not in roles:
            continue  # it is not known yet which clients are large
        values: dict[str, list[float]] = {"small": [], "large": []}
        for client in summary["per_client"]:
            value = client["metrics"][summary["metric"]]
            role = roles[cell.dataset, cell.seed][client["name"]]
            values[role].append(math.nan if value is None else value)
        # A diverged run has no scores for either role, since means over seeds would mix runs.
        scores = group_summary({} if has_diverged(summary) else values)
        rows = run_files.read_metrics(cell.folder / run_files.METRICS)
        # The first round of a process includes tracing and compilation.
        round_s = float(np.median([row["wall_s"] for row in rows[1:] or rows]))
        run = cell.dataset, cell.budget, cell.method, cell.seed
        results.append(Result(*run, summary, scores, round_s))
    return results


def _check_same_data(finished: Sequence[Cell]) -> None:
    """Refuses to compare runs that have read different private data.

    Raises:
      UserError: If the data was replaced between two runs.
    """
    first: dict[tuple[str, int], tuple[Cell, JsonObject]] = {}
    for cell in finished:
        recorded = identity.read_provenance(cell.folder)
        if recorded is None:
            raise UserError(
                f"{cell.folder}: holds a run of an earlier version of fedhelp_jax, which did not "
                "record what it read; remove that folder, or name another one for the study"
            )
        own = {"data": recorded["sources"]["data"]}
        other, theirs = first.setdefault((cell.dataset, cell.seed), (cell, own))
        identity.refuse_other_sources(theirs, own, f"{other.folder} and {cell.folder}")
