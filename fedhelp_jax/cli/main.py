"""The command ``fedhelp``: teach, train, compare and more; what went wrong becomes an exit code.

0: done. 2: something the user can mend, told in one line on stderr. 1: a run that went wrong, told
in one line, or our own failure, with its traceback. 3: another process of a distributed run is
lost. 130: interrupted, after the run was saved.

Nothing heavy is imported before it is needed, so that ``fedhelp --help`` answers at once, and so
that the number of CPU devices can be set before JAX starts.
"""

import ast
import itertools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from fedhelp_jax.cli import usage
from fedhelp_jax.core.errors import Failure, UserError
from fedhelp_jax.core.storage import StorageError, storage_errors
from fedhelp_jax.core.terminal import dispensable_terminal, is_output_lost

if TYPE_CHECKING:  # these bring jax along
    from fedhelp_jax.core.distributed import Address
    from fedhelp_jax.experiments.config import RunConfig
    from fedhelp_jax.experiments.study import Study


_MOST_RUNS = 100_000  # of a sweep


def main_entry() -> None:
    """Runs the command line of this process and exits with its code."""
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code; may be called many times in a process.

    Args:
        argv: program name, command, flags; as `sys.argv`.
    """
    with dispensable_terminal():
        return _exit_code(list(argv))


def _exit_code(argv: list[str]) -> int:
    try:
        with storage_errors():
            return _command(argv)
    except StorageError as error:
        _complain(f"{error}; what was saved before is kept, and the same command goes on from it")
        return 2
    except (UserError, flags.Error) as error:
        _complain(str(error))
        return 2
    except Failure as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except Exception as error:
        # What NumPy and XLA raise where an allocation fails, with its size.
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            _complain(
                f"out of memory ({str(error).splitlines()[0] if str(error) else 'no size is told'})"
                "; smaller batches, images or networks need less"
            )
            return 2
        traceback.print_exc()
        return 1


def _command(argv: list[str]) -> int:
    commands = {
        "teach": _teach,
        "train": _train,
        "evaluate": _evaluate,
        "show": _show,
        "compare": _compare,
        "tune": _tune,
        "sweep": _sweep,
        "data": _data,
        "list": _list,
    }
    name, arguments = (argv[1], argv[2:]) if len(argv) > 1 else ("", [])
    asked = [word for word in argv[1:] if word in ("--help", "-h", "-help")]
    if name == "help" or name in asked or (name in commands and asked):
        print(_help(name), end="")
        return _printed()
    if name not in commands:
        said = f"{name!r} is not a command" if name else "no command is given"
        raise UserError(f"{said}; it is one of {', '.join(commands)} (see fedhelp --help)")
    return commands[name](arguments)


def _help(name: str) -> str:
    if name in ("data", "list"):
        return usage.DATA if name == "data" else usage.LIST
    usages = {"train": usage.TRAIN, "teach": usage.TEACH, "sweep": usage.SWEEP}
    return usages[name] + _settings_help() if name in usages else usage.COMMANDS


def _teach(arguments: list[str]) -> int:
    own = _flags("config", "study")
    flags.DEFINE_bool("dry_run", False, "only print the plan", flag_values=own)
    # --dry-run, as every other command line spells it.
    arguments = [a.replace("--dry-run", "--dry_run", 1) for a in arguments]
    overrides = own(["fedhelp", *arguments], known_only=True)[1:]
    dry_run = bool(own["dry_run"].value)
    from fedhelp_jax.experiments.config_files import load_study, read_settings, refuse_rest

    if own["study"].value:
        if own["config"].value:
            raise UserError("--study names its configs itself; leave --config out")
        refuse_rest(overrides)
        study = load_study(own["study"].value)
        from fedhelp_jax.experiments import study as studies

        studies.teach(study, dry_run=dry_run)
        return 0
    config = read_settings(_required(own, "config", "configs/fed_isic2019.py"), overrides)
    from fedhelp_jax.experiments.teach import teach

    teach(config, dry_run=dry_run)
    return 0


def _train(arguments: list[str]) -> int:
    own = _flags("workdir", "config")
    flags.DEFINE_bool("overwrite", False, "begin anew", flag_values=own)
    _define_address(own)
    overrides = own(["fedhelp", *arguments], known_only=True)[1:]
    source = _required(own, "config", "configs/quickstart.py")
    from fedhelp_jax.experiments.config_files import read_settings
    from fedhelp_jax.experiments.unused import warn_unused

    config = read_settings(source, overrides)
    workdir = _workdir(own, "runs/demo")

    from fedhelp_jax.report import run_files

    run_files.prepare_folder(workdir)
    overwrite = bool(own["overwrite"].value)
    config = _prepare_jax(config, None if overwrite else workdir)
    from fedhelp_jax.core import distributed
    from fedhelp_jax.experiments import runner
    from fedhelp_jax.teachers.resolve import AnswersMissing

    with distributed.joined(_address(own), _complain):
        if distributed.is_coordinator():
            warn_unused(config)
        try:
            return _shown(lambda: runner.train(config, workdir, overwrite))
        except AnswersMissing as error:
            command = shlex.join(["fedhelp", "teach", f"--config={source}", *overrides])
            raise UserError(f"{error}: {command}") from None
        except runner.Interrupted as stop:
            _complain(str(stop) or f"interrupted; the same command goes on from {workdir}")
            return 130


def _evaluate(arguments: list[str]) -> int:
    own = _flags("workdir")
    _define_address(own)
    overrides = own(["fedhelp", *arguments], known_only=True)[1:]
    workdir = _workdir(own, "runs/demo")

    from fedhelp_jax.experiments.config_files import load_run

    config = load_run(workdir / "config.json", overrides)
    _prepare_jax(config)
    from fedhelp_jax.core import distributed
    from fedhelp_jax.experiments import runner

    with distributed.joined(_address(own), _complain):
        return _shown(lambda: runner.evaluate(workdir, config))


def _shown(run: Callable[[], dict[str, Any]]) -> int:
    """Prints what a run came to, also where it diverged; returns the exit code."""
    from fedhelp_jax.core import distributed
    from fedhelp_jax.report import console
    from fedhelp_jax.simulation.divergence import Diverged

    diverged = None
    try:
        summary = run()
    except Diverged as error:  # in all processes alike, which must end together
        diverged, summary = error, error.summary
    if distributed.is_coordinator():
        console.print_summary(summary)
    if diverged is None:
        return 0
    _complain(str(diverged))
    return 1


def _show(arguments: list[str]) -> int:
    folders = flags.FlagValues()(["fedhelp", *arguments])[1:]
    if not folders:
        raise UserError(
            "no run folder is given; e.g. fedhelp show runs/demo/fedhelp runs/demo/local"
        )
    from fedhelp_jax.report import console

    console.show([Path(folder) for folder in folders])
    return _printed()


def _compare(arguments: list[str]) -> int:
    def compare(study: "Study", workdir: Path) -> None:
        from fedhelp_jax.experiments import study as studies

        studies.compare(study, workdir)

    return _with_study(arguments, compare)


def _tune(arguments: list[str]) -> int:
    def tune(study: "Study", workdir: Path) -> None:
        from fedhelp_jax.experiments import study as studies

        if not study.grids:
            raise UserError("the study has no grids, so there is nothing to tune")
        _, failures = studies.tune(study, workdir)
        if failures:
            raise studies.Failed(failures)
        print(f"written: {workdir / 'tuning.csv'}")

    return _with_study(arguments, tune)


def _sweep(arguments: list[str]) -> int:
    own = _flags("workdir", "config", "seeds")
    _define_address(own)
    flags.DEFINE_multi_string("sweep", [], "a setting and its values", flag_values=own)
    flags.DEFINE_enum("split", "validation", ["validation", "test"], "split", flag_values=own)
    flags.DEFINE_integer("runs_at_once", None, "a device", lower_bound=1, flag_values=own)
    overrides = own(["fedhelp", *arguments], known_only=True)[1:]
    source = _required(own, "config", "configs/quickstart.py")
    workdir = _workdir(own, "runs/sweep")
    axes = dict(_axis(text) for text in own["sweep"].value or [])
    from fedhelp_jax.experiments.config_files import read_settings
    from fedhelp_jax.experiments.unused import refuse_unused

    base = read_settings(source, overrides)
    seeds = _seeds(own["seeds"].value) if own["seeds"].value else [base.seed]
    if not axes and len(seeds) == 1:
        raise UserError("--sweep is missing; e.g. --sweep=learning_rate=1e-4,1e-3")
    points = [
        (dict(zip(axes, values, strict=True)), seed)
        for values in itertools.product(*axes.values())
        for seed in seeds
    ]
    found = []
    for point, seed in points:
        own_flags = [f"--config.{key}={value}" for key, value in point.items()]
        config = read_settings(source, [*overrides, *own_flags, f"--config.seed={seed}"])
        refuse_unused(config, point, by_method=True)
        found.append(({**{key: _literal(v) for key, v in point.items()}, "seed": seed}, config))

    from fedhelp_jax.report import run_files

    run_files.prepare_folder(workdir)
    _prepare_jax(base)
    from fedhelp_jax.core import distributed
    from fedhelp_jax.experiments.sweep import sweep
    from fedhelp_jax.experiments.sweep_blocks import Run
    from fedhelp_jax.teachers.resolve import AnswersMissing

    with distributed.joined(_address(own), _complain):
        try:
            sweep(
                [Run(swept, config) for swept, config in found],
                workdir,
                split=str(own["split"].value),
                runs_at_once=own["runs_at_once"].value,
                say=print if distributed.is_coordinator() else lambda text: None,
            )
        except AnswersMissing as error:
            command = shlex.join(["fedhelp", "teach", f"--config={source}", *overrides])
            raise UserError(f"{error}: {command}") from None
        if distributed.is_coordinator():
            print(f"written: {workdir / 'runs.csv'}")
    return 0


def _data(arguments: list[str]) -> int:
    if arguments[:1] == ["check"]:
        return _check_data(arguments[1:])
    from fedhelp_jax.settings.schema import ON_BAD_EXAMPLE

    own = _flags("manual_dir", "data_dir")
    flags.DEFINE_bool("allow_repacked", False, "whatever its checksum", flag_values=own)
    ways = list(ON_BAD_EXAMPLE)
    flags.DEFINE_enum("on_bad_example", ways[0], ways, "unusable files", flag_values=own)
    what, *rest = own(["fedhelp", *arguments])[1:] or [""]
    if what == "list" and not rest:
        from fedhelp_jax.data.builders.prepare import names

        print("\n".join(names()))
        return _printed()
    if what in ("describe", "prepare") and len(rest) == 1:
        from fedhelp_jax.data.builders.prepare import describe, prepare

        if what == "describe":
            print(describe(rest[0]))
            return _printed()
        manual_dir, data_dir = own["manual_dir"].value, own["data_dir"].value
        for name in ("manual_dir", "data_dir"):
            _local(name, own[name].value or "")
        prepare(
            rest[0],
            manual_dir,
            data_dir,
            allow_repacked=bool(own["allow_repacked"].value),
            on_bad_example=str(own["on_bad_example"].value),
        )
        return 0
    raise UserError("fedhelp data takes list, describe NAME, prepare NAME or check; see --help")


def _list(arguments: list[str]) -> int:
    kinds = ("algorithms", "models", "data", "public", "teachers", "metrics")
    if len(arguments) != 1 or arguments[0] not in kinds:
        raise UserError(f"fedhelp list takes one of {', '.join(kinds)}")
    from fedhelp_jax.cli.listing import about

    rows = about(arguments[0])
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    return _printed()


def _check_data(arguments: list[str]) -> int:
    own = _flags("config", "workdir")
    overrides = own(["fedhelp", *arguments], known_only=True)[1:]
    source = _required(own, "config", "configs/quickstart.py")
    folder = own["workdir"].value
    from fedhelp_jax.experiments.check_data import check_data
    from fedhelp_jax.experiments.config_files import read_settings

    config = read_settings(source, overrides)
    sheets = Path(_local("workdir", folder)) if folder else None
    return 0 if check_data(config, sheets) else 2


def _axis(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not found:
        raise UserError(f"--sweep={text}: must be KEY=VALUE,VALUE; e.g. learning_rate=1e-4,1e-3")
    if key == "seed":
        raise UserError(f"--sweep={text}: seeds have a flag of their own; e.g. --seeds=0:4")
    return key, found


def _seeds(text: str) -> list[int]:
    try:
        if ":" in text:
            first, end = map(int, text.split(":"))
            seeds = range(first, min(end, first + _MOST_RUNS + 1))
        else:
            seeds = list(map(int, text.split(",")))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(seeds) > _MOST_RUNS or len(set(seeds)) < len(seeds):
        raise UserError(
            f"--seeds={text}: must be FIRST:END or N,N,..., at most {_MOST_RUNS:,}; e.g. 0:4 or "
            "1,5,7"
        )
    return list(seeds)


def _literal(text: str) -> Any:
    """Returns a number as such, for the table; anything else as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _with_study(arguments: list[str], do: Callable[["Study", Path], None]) -> int:
    own = _flags("workdir", "study")
    from fedhelp_jax.experiments.config_files import load_study, refuse_rest

    refuse_rest(own(["fedhelp", *arguments])[1:])
    study = load_study(_required(own, "study", "configs/studies/miniature.py"))
    workdir = _workdir(own, "runs/miniature")

    from fedhelp_jax.report import run_files

    run_files.prepare_folder(workdir)
    from fedhelp_jax.experiments.study import first_config, stopped_run

    _prepare_jax(first_config(study), stopped_run(workdir))
    from fedhelp_jax.experiments import runner
    from fedhelp_jax.experiments.study import Failed
    from fedhelp_jax.teachers.resolve import AnswersMissing

    try:
        do(study, workdir)
    except Failed as failed:
        if not any(isinstance(error, AnswersMissing) for _, error in failed.failures):
            raise
        command = shlex.join(["fedhelp", "teach", f"--study={own['study'].value}"])
        raise UserError(f"{failed}: {command}") from None
    except runner.Interrupted as stop:
        _complain(str(stop))
        return 130
    return 0


def _settings_help() -> str:
    from fedhelp_jax.experiments import config as config_lib

    lines = [
        f"  --config.{key}={default}".ljust(48) + f" {about}"
        for key, default, about in config_lib.describe()
    ]
    return "\n".join(lines) + "\n"


# --- flags and settings -------------------------------------------------------------------------


def _flags(*names: str) -> flags.FlagValues:
    """Returns string flags of their own, so that calls of `main` share no state."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for name in names:
        flags.DEFINE_string(name, None, name, flag_values=values)
    return values


def _define_address(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("distributed", False, "one of many processes", flag_values=values)
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which", lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        "heartbeat_timeout", None, "seconds", lower_bound=1, upper_bound=90, flag_values=values
    )


def _address(values: flags.FlagValues) -> "Address | None":
    """Returns where the processes of a distributed run meet, or None for a run of one."""
    from fedhelp_jax.core.distributed import Address

    given: dict[str, Any] = {name: values[name].value for name in Address._fields}
    given = {name: value for name, value in given.items() if value is not None}
    if values["distributed"].value:
        return Address(**given)
    if given:
        raise UserError(f"--{next(iter(given))} is for --distributed, which is not given")
    return None


def _required(values: flags.FlagValues, name: str, example: str) -> str:
    value = values[name].value
    if not value:
        raise UserError(f"--{name} is missing; e.g. --{name}={example}")
    return value


def _workdir(values: flags.FlagValues, example: str) -> Path:
    return Path(_local("workdir", _required(values, "workdir", example)))


def _local(name: str, value: str) -> str:
    """Returns the value of a flag that names a folder; s3://... would be made as a folder s3:."""
    from fedhelp_jax.settings.checks import LOCAL

    if not LOCAL.passes(value):
        raise UserError(f"--{name}={value} must be {LOCAL.right}")
    return value


# --- the process --------------------------------------------------------------------------------


def _prepare_jax(config: "RunConfig", run: Path | None = None) -> "RunConfig":
    """Keeps compiled programs, and sets how many devices the CPU is, if JAX has not started yet.

    Args:
        config: The settings.
        run: The folder of a run to go on with, on as many devices as it was started with.

    Returns:
        The settings, with the mapping of that run.
    """
    import jax

    from fedhelp_jax.core.compilation import keep_programs, protect_process
    from fedhelp_jax.data.cache import cache_folder

    protect_process()
    keep_programs(cache_folder(None) / "compiled")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = min(cores or 1, 8)
    if run is not None:
        from fedhelp_jax.experiments.identity import as_started

        config = as_started(config, run, devices)
    try:
        jax.config.update("jax_num_cpu_devices", config.mapping.cpu_devices or devices)
    except RuntimeError:
        pass  # a back end is in use: a library's caller, or an earlier call, has chosen
    return config


def _printed() -> int:
    """The exit code of a command that does nothing but print."""
    return 2 if is_output_lost() else 0


def _complain(message: str) -> None:
    print("fedhelp:", " ".join(message.split()), file=sys.stderr)
