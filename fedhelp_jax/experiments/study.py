"""Studies: methods x data sets x budgets x seeds, each a run of its own, in one folder.

``WORKDIR/<data set>/<method>/seed<N>`` is a run folder like any other. What is finished there is
not run again, and a run that was stopped goes on, so the same command on the same folder goes on
with a study where it stopped, and ends with the same table.

Every method gets the same data, rounds, local epochs and batches: a study may change for one
method only what `METHOD_SETTINGS` names. Where it tunes, every method gets the same number of
trials, and they are judged on the clients' validation images; no test image is looked at.
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

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.core.locks import folder_lock
from fedhelp_jax.core.storage import StorageError, storage_errors
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments import identity, runner
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.teach import teach as teach_run
from fedhelp_jax.experiments.unused import refuse_unused
from fedhelp_jax.report import run_files
from fedhelp_jax.report.comparison import Result, write_comparison
from fedhelp_jax.report.console import duration
from fedhelp_jax.report.summary import group_summary, has_diverged, mean_of_roles
from fedhelp_jax.simulation.divergence import Diverged
from fedhelp_jax.teachers.resolve import is_asked, members
from fedhelp_jax.typing import JsonObject, Record

Settings = Record

# What may differ from method to method, as keys or parts of settings.
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
    """What a study file's ``get_study()`` returns.

    Attributes:
      datasets: Name -> settings: `default_config`, changed; or a config file, as ``--config`` takes
        it, relative to the study file.
      methods: Label -> what the method changes, by dotted key. ``algorithm.name`` is the label
        where it is not given.
      seeds: One run each; the data are shared out by the seed too.
      budgets: Name -> what it changes in all runs, by dotted key, such as ``{"20 rounds":
        {"rounds": 20}}``; the name is added to the data set's.
      reference: Label of the method that the others are tested against.
      grids: Label -> {dotted key: values to try}. Empty: nothing is tuned. Otherwise of every
        method, because tuning some is no comparison.
      trials: Points of its grid that are tried for each method and data set; of a larger grid,
        drawn at random.
      tuning_seed: Of the trials, apart from `seeds`.
    """

    datasets: Record
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
    """Some runs of a study could not be made; the others were.

    Attributes:
      failures: Each of these runs and why.
    """

    def __init__(self, failures: "Failures"):
        self.failures = failures
        super().__init__(f"runs failed ({len(failures)}): {'; '.join(_reasons(failures))}")


Failures = list[tuple[Cell, Exception]]


def compare(study: Study, workdir: Path) -> None:
    """Tunes and runs what is missing, then prints the comparison and writes it to `workdir`.

    Raises:
      UserError: If the study is not sound, or a folder holds another run.
      Failed: If some runs were refused; the table then lacks them.
      Interrupted: After SIGINT or SIGTERM, once the run under way is saved.
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
    """Runs the trials that are missing and chooses each method's settings on each data set.

    A trial's score is the mean, over the two roles, of the role's mean headline metric on its
    clients' *validation* images after the last round; the first of equal ones is chosen. A trial
    that has diverged has no score. All trials are written to ``tuning.csv``.

    Returns:
      ``{(data set, method): {dotted key: value}}``, empty if the study has no grids; and which
      trials failed, and why. A method with such a trial has no entry for that data set.

    Raises:
      UserError: If the study is not sound, or no client has validation images.
      Interrupted: After SIGINT or SIGTERM, once the trial under way is saved.
    """
    with folder_lock(workdir):
        return _tune(study, workdir)


def _tune(study: Study, workdir: Path) -> tuple[dict[tuple[str, str], Settings], Failures]:
    trials = dict(_trials(study, workdir))
    list(_cells(study, workdir, {}))  # whatever is wrong with the runs is told before the trials
    failures = _run_missing([cell for cells in trials.values() for cell, _ in cells])
    chosen, rows = {}, []
    for (dataset, method), cells in trials.items():
        if not all(_is_done(cell) for cell, _ in cells):
            continue  # a method is tuned by all its trials, or not compared there
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
    """Gets the answers of all foundation models that a study's runs learn from, each once.

    Raises:
      UserError: If the study is not sound, none is asked, or as in
        `fedhelp_jax.experiments.teach.teach`.
    """
    # What is asked, and what must not be among it, follows from these alone.
    asked = {
        repr((config.data, config.public, config.teacher, config.seed)): config
        for config in _all_configs(study)
        if config.public.name != "none" and any(map(is_asked, members(config.teacher)))
    }
    if not asked:
        raise UserError("no run of the study has a foundation model that must be asked")
    for config in asked.values():
        teach_run(config, dry_run=dry_run)


def _all_configs(study: Study) -> Iterator[RunConfig]:
    """Of trials and runs; what is tuned does not change a teacher's answers."""
    for _, cells in _trials(study, Path()):
        yield from (cell.config for cell, _ in cells)
    yield from (cell.config for cell in _cells(study, Path(), {}))


def first_config(study: Study) -> RunConfig:
    """The settings of a study's first run, of which the process takes its number of CPU devices.

    Raises:
      UserError: If the study is not sound.
    """
    return next(_cells(study, Path(), {})).config


def stopped_run(workdir: Path) -> Path | None:
    """The folder of a run of the study that was begun and is not finished, if there is one."""
    begun = sorted(path.parent for path in workdir.glob(f"*/*/*/{identity.PROVENANCE}"))
    return next((folder for folder in begun if not (folder / "summary.json").exists()), None)


# --- which runs there are -----------------------------------------------------------------------


def _blocks(study: Study) -> Iterator[tuple[str, str, Any]]:
    """Name, budget and settings of each data set at each budget."""
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
    """Per data set and method, its trials and their points of the grid."""
    _check(study)
    for dataset, budget, base in _blocks(study):
        if study.grids and base.data.name == "npz_masks":
            raise UserError(
                f"grids: the test images of {dataset} are drawn by the seed (npz_masks), so trials "
                "would be trained and judged on those of other runs; leave grids out"
            )
        for method, grid in study.grids.items():
            cells = []
            for trial, point in enumerate(grid_points(grid, study.trials, method)):
                settings = {**_settings(study, method, point), "seed": study.tuning_seed}
                config = _configured(base, settings, f"{dataset}, {method}, trial {trial}")
                folder = workdir / dataset / method / f"trial{trial}"
                cell = Cell(dataset, budget, method, study.tuning_seed, config, folder, trial)
                cells.append((cell, point))
            yield (dataset, method), cells


def grid_points(grid: Mapping[str, Sequence[Any]], trials: int, method: str) -> list[Settings]:
    """``trials`` points of a grid, in its order; of a larger one drawn at random, always the same.

    Raises:
      UserError: If the grid has fewer.

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
            said = str(error.args[0]).split(" Other fields present")[0]  # pages of them
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
        raise UserError(f"reference = {study.reference!r} must be one of methods{known}")
    if study.grids:
        uneven = set(study.grids) ^ set(study.methods)
        if uneven:
            raise UserError(
                f"grids must name every method and no other, so that all get the same trials; "
                f"see {', '.join(sorted(uneven))}"
            )
        if study.tuning_seed in study.seeds:
            raise UserError(f"tuning_seed = {study.tuning_seed} must not be one of seeds")
        if study.trials < 1:
            raise UserError(f"trials = {study.trials} must be at least 1")


def _checked_name(what: str, name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise UserError(f"{what}: {name!r} must be a name that a folder can have")
    return name


# --- running them -------------------------------------------------------------------------------


def _is_done(cell: Cell) -> bool:
    """Whether its run is finished.

    Raises:
      UserError: If its folder holds a run of other settings.
    """
    config, summary = cell.folder / "config.json", cell.folder / "summary.json"
    if not config.exists():
        return False
    identity.refuse_other_settings(configs.load(config), cell.config, str(cell.folder))
    if not summary.exists():
        return False
    found = run_files.read_summary(cell.folder)
    if found.get("stopped_after") is not None and cell.config.on_divergence == "continue":
        return False
    # A trial counts only by validation images, whatever was done in its folder since.
    return found.get("rounds") == cell.config.rounds and (
        cell.trial is None or found.get("split") == "validation"
    )


def _run_missing(cells: Sequence[Cell], say: Callable[[str], None] = print) -> Failures:
    """Runs what is not finished; returns what failed, and why."""
    missing = [cell for cell in cells if not _is_done(cell)]
    if len(missing) < len(cells):
        say(f"{len(cells) - len(missing)} of {len(cells)} runs are finished")
    failures: Failures = []
    started = time.monotonic()
    for number, cell in enumerate(missing):
        left = (time.monotonic() - started) / number * (len(missing) - number) if number else None
        say(
            f"run {number + 1} of {len(missing)}: {cell}"
            + ("" if left is None else f"  ({duration(left)} left)")
        )
        run_files.prepare_folder(cell.folder)
        try:
            split = "test" if cell.trial is None else "validation"
            with storage_errors():
                runner.train(cell.config, cell.folder, split=split)
        except StorageError:
            raise  # the next run would end there too, after its first rounds
        except UserError as error:
            say(f"refused: {error}")
            failures.append((cell, error))
        except Diverged as error:
            say(f"diverged: {error}")  # a result as well: the tables tell it
        except runner.Interrupted:
            raise
        except Exception as error:  # of memory, or ours: one run is no reason to lose a night's
            traceback.print_exc()
            failures.append((cell, error))
        jax.clear_caches()  # the programs of a run serve no other; the next one's come from disk
    return failures


def _reasons(failures: Failures) -> list[str]:
    """Why runs failed, each reason once."""
    by_reason: dict[str, list[Cell]] = {}
    for cell, error in failures:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        by_reason.setdefault(f"{kind}{error}", []).append(cell)
    return [
        f"{cells[0]}" + (f" and {len(cells) - 1} more" if cells[1:] else "") + f": {reason}"
        for reason, cells in by_reason.items()
    ]


def _results(study: Study, cells: Sequence[Cell], finished: Sequence[Cell]) -> list[Result]:
    """What the finished ones came to, with clients grouped as the reference groups them."""
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
            continue  # nothing says yet which clients are large
        values: dict[str, list[float]] = {"small": [], "large": []}
        for client in summary["per_client"]:
            value = client["metrics"][summary["metric"]]
            role = roles[cell.dataset, cell.seed][client["name"]]
            values[role].append(math.nan if value is None else value)
        # Not even of the role that did not, for means over seeds would then mix runs.
        scores = group_summary({} if has_diverged(summary) else values)
        rows = run_files.read_metrics(cell.folder / "metrics.jsonl")
        # The first of a process compiles and traces.
        round_s = float(np.median([row["wall_s"] for row in rows[1:] or rows]))
        run = cell.dataset, cell.budget, cell.method, cell.seed
        results.append(Result(*run, summary, scores, round_s))
    return results


def _check_same_data(finished: Sequence[Cell]) -> None:
    """Refuses to compare runs that have read other private data, as replaced between them.

    Raises:
      UserError: If they have.
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
