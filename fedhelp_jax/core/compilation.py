"""Compiles programs with options that keep their results right, counts them and caches them.

XLA's CPU back end can return wrong matrix products from programs with long loops
(``docs/cpu-race.md`` explains the cause). Every program of this package is therefore compiled by
:func:`jit`, which passes the compiler option that prevents it. Code that runs inside a program uses
:func:`traced_once` instead.
"""

import contextlib
import contextvars
import functools
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.core.storage import StorageError, storage_errors

_log = logging.getLogger(__name__)

# This pass splits operations over the threads of a pool. Its helper tasks fill the pool's queue,
# and a matrix product whose own tasks find the queue full comes out wrong.
_SPLITTING = "cpu-parallel-task-assigner"
# This pass drops the barriers between values and their recomputation for the backward pass. XLA
# then finds both equal and keeps the first, so that `model.remat` would save nothing.
_DROPPING_BARRIERS = "cse_barrier_expander"
# 0.6.2 to 0.11.2 return wrong products in `docs/xla_race.py`. 0.12.0 does not, but it is not known
# whether its sources are fixed, so the options stay.
_FIRST_UNAFFECTED = (0, 12)
_PROCESS_FLAG = f"--xla_disable_hlo_passes={_SPLITTING}"

# Beyond this size, the least recently used programs are removed.
_MAX_KEPT_BYTES = 2 * 1024**3

# Seconds. Most of the many small programs of a run take less.
_WORTH_TELLING = 0.5

_traced_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


# --- programs -----------------------------------------------------------------------------------


def compiler_options(platform: str | None = None, *, optimized: bool = True) -> dict[str, Any]:
    """Returns the options that a program of this package is compiled with.

    Args:
      platform: "cpu", "gpu" or "tpu"; None stands for JAX's default back end.
      optimized: Whether LLVM optimizes the program. Programs that only move memory compile in half
        the time on CPU without optimization.

    Returns:
      Options for ``jax.jit(compiler_options=...)`` or ``lowered.compile(...)``; empty on other back
      ends than the CPU's.

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
        """Stores how to call ``jax.jit``, which is deferred because it must know the back end."""
        self._make = make

    @functools.cached_property
    def _compiled(self) -> Any:
        return self._make()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the compiled function."""
        return self._compiled(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Lowers the function for these arguments; ``compile()`` then uses the same options."""
        return self._compiled.lower(*args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the shapes of the function's results, without computing them."""
        return self._compiled.eval_shape(*args, **kwargs)


def jit(
    fn: Callable[..., Any],
    *,
    platform: str | None = None,
    optimized: bool = True,
    **options: Any,
) -> Program:
    """Compiles a whole program by ``jax.jit`` with the options of :func:`compiler_options`.

    Args:
      fn: The function. It must not be called inside another program, where JAX refuses compiler
        options; use :func:`traced_once` there.
      platform: As in :func:`compiler_options`. The back end is not initialised before the first
        call, so that this can be used as a decorator in a module.
      optimized: As in :func:`compiler_options`.
      **options: Options of ``jax.jit``.

    Returns:
      The program.

    Example:
      >>> double = jit(lambda x: 2 * x)
      >>> float(double(3.0))
      6.0
    """

    @functools.wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with tracing_for(platform or jax.default_backend()):
            return fn(*args, **kwargs)

    # Profiles and compilation logs show this name; a partial has none of its own.
    traced.__name__ = getattr(getattr(fn, "func", fn), "__name__", "program")

    def make() -> Any:
        chosen = compiler_options(platform, optimized=optimized)
        return jax.jit(traced, compiler_options=chosen or None, **options)

    return Program(make)


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Makes `traced_for` return a platform."""
    token = _traced_for.set(platform)
    try:
        yield
    finally:
        _traced_for.reset(token)


def traced_for() -> str | None:
    """Returns "cpu", "gpu" or "tpu", for which :func:`jit` traces a function; None outside of it.

    It chooses between forms of a computation that keep their arrays in different layouts. Where the
    layout is the same, ``lax.platform_dependent`` chooses, which also works in programs of others.
    """
    return _traced_for.get()


def traced_once(fn: Callable[..., Any], *static_argnums: int) -> Callable[..., Any]:
    """Marks a function that runs inside a program, so that JAX traces it only once.

    Tracing a deep network takes about as long as compiling it, and a loop's body is traced both for
    its shapes and for its code. The enclosing program determines how the function is compiled.

    Args:
      fn: The function.
      *static_argnums: The positions of arguments that are no arrays.
    """
    return jax.jit(fn, static_argnums=static_argnums)


# --- programs of others -------------------------------------------------------------------------


def protect_process() -> None:
    """Makes XLA compile every program of this process safely, including other libraries' programs.

    It adds a flag to the environment variable ``XLA_FLAGS``, which XLA reads once, when it compiles
    for the first time. Call it before that, or set the variable before Python starts::

        XLA_FLAGS=--xla_disable_hlo_passes=cpu-parallel-task-assigner python ...

    The flag has no effect on GPUs and TPUs.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _PROCESS_FLAG not in flags.split():
        os.environ["XLA_FLAGS"] = f"{flags} {_PROCESS_FLAG}".strip()


def jaxlib_release() -> tuple[int, ...]:
    """Returns the major and minor number of jaxlib's version."""
    return tuple(map(int, version("jaxlib").split(".")[:2]))


def jaxlib_is_affected() -> bool:
    """Returns whether jaxlib is older than the first release in which no error was seen."""
    return jaxlib_release() < _FIRST_UNAFFECTED


@functools.cache
def process_is_exposed() -> bool:
    """Returns whether programs compiled in this process without our options may go wrong.

    To find out, it compiles a small program and looks for operations that XLA splits over threads.
    A process is not exposed if it has a single core, called :func:`protect_process`, or uses a
    newer jaxlib or another back end than the CPU.
    """
    if not jaxlib_is_affected() or jax.default_backend() != "cpu":
        return False
    large = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    program = jax.jit(lambda x: jnp.tanh(2 * x + 1)).lower(large).compile()
    return "outer_dimension_partitions" in (program.as_text() or "")


def warn_if_exposed() -> None:
    """Warns if a training or evaluation loop is traced into a program that may go wrong.

    Programs made by :func:`jit` and processes under :func:`protect_process` are safe.
    """
    if traced_for() is None and process_is_exposed():
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
    """How many programs this process has compiled since the count started, and in what time."""

    programs: int
    seconds: float


class _Counter:
    def __init__(self):
        self.totals, self._lock = CompileTotals(0, 0.0), threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            if duration_secs > _WORTH_TELLING:
                name = about.get("fun_name", "a program")
                _log.info("%s compiled, or loaded, in %.1f s", name, duration_secs)
            with self._lock:  # programs may be compiled on several threads
                self.totals = CompileTotals(
                    self.totals.programs + 1, self.totals.seconds + duration_secs
                )


@functools.cache
def _counter() -> _Counter:
    return _Counter()


def compile_totals() -> CompileTotals:
    """Returns the totals up to now; the first call starts the count at zero."""
    return _counter().totals


def keep_programs(folder: Path) -> None:
    """Caches compiled programs in a folder, unless JAX is configured to cache them elsewhere.

    The next start of a run, and the other seeds of a study, then compile next to nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        # Remove programs without an access time, which a killed process leaves behind. JAX evicts
        # programs by these times, and would stop caching anything.
        try:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for program in folder.glob("*-cache"):
                    used = program.with_name(program.name.removesuffix("-cache") + "-atime")
                    if not used.exists():
                        program.unlink(missing_ok=True)
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(bytes(4096))
        except StorageError as error:  # JAX would warn for each program
            _log.warning("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _MAX_KEPT_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
