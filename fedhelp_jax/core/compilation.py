"""How programs are compiled: the options that keep their results right, a count, and a cache.

XLA's CPU back end can return wrong matrix products from programs with long loops
(``docs/cpu-race.md`` has the cause). Every program of this package is therefore compiled by
:func:`jit`, which passes the compiler option that prevents it. Code that runs inside a program uses
:func:`traced_once` instead.
"""

import contextlib
import contextvars
import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.core.storage import StorageError, storage_errors

_log = logging.getLogger(__name__)

# Splits operations over the threads of a pool. Its helper tasks fill the pool's queue, and a matrix
# product whose own tasks find the queue full comes out wrong.
_SPLITTING = "cpu-parallel-task-assigner"
# Drops the barriers between what is computed and what is computed again for the backward pass. XLA
# then finds both equal and keeps the first, so that `model.remat` would save nothing.
_DROPPING_BARRIERS = "cse_barrier_expander"
# 0.6.2 to 0.11.2 return wrong products in `docs/xla_race.py`. 0.12.0 does not, but that its sources
# are mended is not known, so the options stay.
_FIRST_UNAFFECTED = (0, 12)
_PROCESS_FLAG = f"--xla_disable_hlo_passes={_SPLITTING}"

# Programs unused for longest are removed beyond it.
_MAX_KEPT_BYTES = 2 * 1024**3

_safe: contextvars.ContextVar[bool] = contextvars.ContextVar("safe", default=False)


# --- programs -----------------------------------------------------------------------------------


def compiler_options(platform: str | None = None, *, optimized: bool = True) -> dict[str, Any]:
    """Returns the options that a program of this package is compiled with.

    Args:
      platform: "cpu", "gpu" or "tpu"; None stands for JAX's default back end.
      optimized: Whether LLVM optimizes the program. Without that, programs that only move memory
        compile in half the time on CPU.

    Returns:
      Options for ``jax.jit(compiler_options=...)`` or ``lowered.compile(...)``; none off the CPU.

    Example:
      >>> compiler_options("cpu")
      {'xla_disable_hlo_passes': 'cpu-parallel-task-assigner,cse_barrier_expander'}
      >>> compiler_options("gpu")
      {}
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    options: dict[str, Any] = {"xla_disable_hlo_passes": f"{_SPLITTING},{_DROPPING_BARRIERS}"}
    return options if optimized else options | {"xla_backend_optimization_level": 0}


class Program:
    """A function that is compiled by :func:`jit`; it can be called, lowered and evaluated."""

    def __init__(self, make: Callable[[], Any]):
        """Keeps how to make the function of ``jax.jit``, which needs to know the back end."""
        self._make = make

    @functools.cached_property
    def _compiled(self) -> Any:
        return self._make()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the compiled function."""
        return self._compiled(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The function lowered for these arguments; its ``compile()`` takes the same options."""
        return self._compiled.lower(*args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes that the function returns, without computing them."""
        return self._compiled.eval_shape(*args, **kwargs)


def jit(
    fn: Callable[..., Any],
    *,
    platform: str | None = None,
    optimized: bool = True,
    **options: Any,
) -> Program:
    """``jax.jit`` with the options of :func:`compiler_options`, for a whole program.

    Args:
      fn: The function. It must not be called inside another program, where JAX refuses compiler
        options; use :func:`traced_once` there.
      platform: As in :func:`compiler_options`. Nothing is asked of the back end before the first
        call, so that a module may use this as a decorator.
      optimized: As in :func:`compiler_options`.
      **options: Those of ``jax.jit``.

    Returns:
      The program.

    Example:
      >>> double = jit(lambda x: 2 * x)
      >>> float(double(3.0))
      6.0
    """

    @functools.wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with _tracing_safely():
            return fn(*args, **kwargs)

    # Profiles and compilation logs call the program by it; a partial has no name of its own.
    traced.__name__ = getattr(getattr(fn, "func", fn), "__name__", "program")

    def make() -> Any:
        chosen = compiler_options(platform, optimized=optimized)
        return jax.jit(traced, compiler_options=chosen or None, **options)

    return Program(make)


def traced_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that runs inside a program, so that JAX traces it only once.

    Tracing a deep network takes about as long as compiling it, and a loop's body is traced both for
    its shapes and for its code. The program around it decides how it is compiled.
    """
    return jax.jit(fn)


# --- programs of others -------------------------------------------------------------------------


@contextlib.contextmanager
def _tracing_safely() -> Iterator[None]:
    token = _safe.set(True)
    try:
        yield
    finally:
        _safe.reset(token)


def protect_process() -> None:
    """Makes XLA compile every program of this process safely, those of other libraries too.

    It adds a flag to the environment variable ``XLA_FLAGS``, which XLA reads once, when it compiles
    for the first time. Call it before that, or set the variable before Python starts::

        XLA_FLAGS=--xla_disable_hlo_passes=cpu-parallel-task-assigner python ...

    The flag has no effect on GPUs and TPUs.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _PROCESS_FLAG not in flags.split():
        os.environ["XLA_FLAGS"] = f"{flags} {_PROCESS_FLAG}".strip()


def jaxlib_is_affected() -> bool:
    """Whether the installed jaxlib is older than the first release not seen to go wrong."""
    return tuple(map(int, version("jaxlib").split(".")[:2])) < _FIRST_UNAFFECTED


@functools.cache
def process_is_exposed() -> bool:
    """Whether programs of this process that are compiled without our options may go wrong.

    It is found by compiling a small program and looking for what XLA splits over threads. A process
    with a single core, :func:`protect_process`, a newer jaxlib or another back end than CPU is not
    exposed.
    """
    if not jaxlib_is_affected() or jax.default_backend() != "cpu":
        return False
    large = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    program = jax.jit(lambda x: jnp.tanh(2 * x + 1)).lower(large).compile()
    return "outer_dimension_partitions" in (program.as_text() or "")


def warn_if_exposed() -> None:
    """Warns where a training or evaluation loop is traced into a program that may go wrong.

    Programs made by :func:`jit` and processes under :func:`protect_process` are safe.
    """
    if not _safe.get() and process_is_exposed():
        warnings.warn(
            "XLA's CPU back end may return wrong matrix products from this loop. Compile it with "
            "fedhelp_jax.core.compilation.jit instead of jax.jit, or call "
            "fedhelp_jax.core.compilation.protect_process() before JAX first computes "
            "(docs/cpu-race.md)",
            RuntimeWarning,
            stacklevel=3,
        )


# --- count and cache ----------------------------------------------------------------------------


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


def keep_programs(folder: Path) -> None:
    """Keeps what is compiled in a folder, unless JAX was told to keep it elsewhere.

    The next start of a run, and the other seeds of a study, then compile next to nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        # A program whose time of use a killed process did not get to write: JAX, which looks for
        # what to remove by these times, would not keep anything any more.
        try:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for program in folder.glob("*-cache"):
                    used = program.with_name(program.name.removesuffix("-cache") + "-atime")
                    if not used.exists():
                        program.unlink(missing_ok=True)
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(bytes(4096))
        except StorageError as error:  # JAX would say so of each program
            _log.warning("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _MAX_KEPT_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
