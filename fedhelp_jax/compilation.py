"""Counts what JAX compiles, so that a run can tell it from computing, and keeps it for the next."""

import functools
from typing import NamedTuple

import jax

from fedhelp_jax.data.cache import cache_folder

# Programs unused for longest are removed beyond it.
_MAX_KEPT_BYTES = 2 * 1024**3


class CompileTotals(NamedTuple):
    """How many programs this process has compiled since the first look, and in how many seconds."""

    programs: int
    seconds: float


class _Counter:
    def __init__(self):
        self.totals = CompileTotals(0, 0.0)
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.totals = CompileTotals(
                self.totals.programs + 1, self.totals.seconds + duration_secs
            )


@functools.cache
def _counter() -> _Counter:
    return _Counter()


def compile_totals() -> CompileTotals:
    """The totals up to now; the first call starts the count at zero."""
    return _counter().totals


def keep_programs() -> None:
    """Keeps what is compiled in the user's cache folder, unless JAX was told to keep it elsewhere.

    The next start of a run, and the other seeds of a study, then compile next to nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_folder(None) / "compiled"
        # A program whose time of use a killed process did not get to write: JAX, which looks for
        # what to remove by these times, would not keep anything any more.
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink(missing_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _MAX_KEPT_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
