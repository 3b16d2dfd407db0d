"""Counts what JAX compiles, so that a run can tell compiling from computing."""

import functools
from typing import NamedTuple

import jax


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
