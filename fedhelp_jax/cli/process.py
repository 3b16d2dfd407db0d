"""Helpers that commands share, such as error messages, JAX's set-up and distributed processes."""

import contextlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedhelp_jax.cli.command import Given
from fedhelp_jax.core.errors import Failure, UserError
from fedhelp_jax.core.terminal import is_output_lost, wrapped

if TYPE_CHECKING:  # these import JAX
    from fedhelp_jax.core.distributed import Address
    from fedhelp_jax.experiments.config import RunConfig


def complain(message: str) -> None:
    """Prints one line on stderr."""
    print(wrapped(f"fedhelp: {' '.join(message.split())}", sys.stderr), file=sys.stderr)


@contextlib.contextmanager
def as_loud_as_asked(given: Given) -> Iterator[None]:
    """Follows ``--quiet`` and ``--verbose`` while a command runs.

    Raises:
      UserError: If both are given.
    """
    quiet, verbose = given.values.get("quiet"), given.values.get("verbose")
    if quiet and verbose:
        raise UserError("--quiet and --verbose cannot be followed together; leave one out")
    with contextlib.ExitStack() as stack:
        if quiet:
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(null))
        if verbose or not logging.getLogger().handlers:  # else the calling program shows warnings
            stack.enter_context(_printed_log(verbose=bool(verbose)))
        try:
            yield
        except (UserError, Failure, OSError):
            if verbose:
                traceback.print_exc()
            raise


@contextlib.contextmanager
def _printed_log(verbose: bool) -> Iterator[None]:
    """Prints the package's warnings, and with ``verbose`` all that it logs with the time of day.

    The log is not passed on, since a library that is imported later may set up logging and would
    print each warning again, in its own form.
    """
    log, handler = logging.getLogger("fedhelp_jax"), _Printed()
    before, log.propagate = (log.level, log.propagate), False
    log.addHandler(handler)
    if verbose:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


class _Printed(logging.Handler):
    """Prints to what stderr is at the time; a live line on the screen takes its place meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        print(wrapped(self.format(record), sys.stderr), file=sys.stderr)


def printed() -> int:
    """Returns the exit code of a command that only prints."""
    return 2 if is_output_lost() else 0


def address(given: Given) -> "Address | None":
    """Returns the address at which distributed processes meet, or None for a single process."""
    from fedhelp_jax.core.distributed import Address

    values = {name: given[name] for name in Address._fields if given[name] is not None}
    if given["distributed"]:
        return Address(**values)
    if values:
        raise UserError(f"--{next(iter(values))} is for --distributed, which is not given")
    return None


def teach_first(error: Exception, *flags: str) -> UserError:
    """Returns an error that tells the user to run ``fedhelp teach`` first."""
    return UserError(f"{error}: {shlex.join(['fedhelp', 'teach', *flags])}")


def prepare_jax(config: "RunConfig", run: Path | None = None) -> "RunConfig":
    """Enables the compilation cache and, if JAX has not started, sets the number of CPU devices.

    Args:
        config: The settings.
        run: The folder of a run to resume, on as many devices as it was started with.

    Returns:
        The settings, with the mapping of that run.
    """
    import jax

    from fedhelp_jax.core.compilation import compile_totals, keep_programs, protect_process
    from fedhelp_jax.data.cache import cache_folder

    protect_process()
    compile_totals()  # counts, and tells with --verbose, from here on
    keep_programs(cache_folder(None) / "compiled")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = min(cores or 1, 8)
    if run is not None:
        from fedhelp_jax.experiments.identity import as_started

        config = as_started(config, run, devices)
    try:
        jax.config.update("jax_num_cpu_devices", config.mapping.cpu_devices or devices)
    except RuntimeError:
        pass  # JAX has started, so the calling program or an earlier call has chosen the number
    return config


def ready_folder(given: Given) -> Path:
    """Returns the folder of ``--workdir``, which is created if it is missing.

    Raises:
      UserError: If the folder cannot be created or written to.
    """
    from fedhelp_jax.report.run_files import prepare_folder

    folder = Path(given["workdir"])
    prepare_folder(folder)
    return folder


def settings_of(given: Given, more: Sequence[str] = ()) -> "RunConfig":
    """Returns the settings of ``--config``, with the remaining flags and ``more`` applied."""
    from fedhelp_jax.experiments.config_files import read_settings

    return read_settings(given["config"], [*given.rest, *more])
