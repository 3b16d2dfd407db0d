"""Joins many processes into one run, makes them agree, and handles the loss of one of them.

Every process runs the same program on its own devices, and the devices of all form one mesh. In
addition, the processes tell each other that they are alive, or why they end, through the key-value
store of JAX's coordination service. JAX itself would abort a process that misses another with a
stack trace, and would leave a process waiting that is in a collective of an idle network.
"""

import collections
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.storage import storage_errors

LOST = 3  # the exit code if another process is lost

_START_TIMEOUT = 290  # seconds; JAX's own is 300

_LONGEST_WAIT = 30 * 24 * 3600  # seconds that a process waits for the slowest one

_ALIVE, _ENDED = "fedhelp/alive", "fedhelp/ended"


class Address(NamedTuple):
    """Where the processes meet; JAX detects what is None (SLURM, GKE, TPU pods, Open MPI).

    Attributes:
      coordinator_address: ``HOST:PORT`` of process 0.
      num_processes: Number of processes.
      process_id: The number of this process, from 0.
      heartbeat_timeout: Seconds without a sign of life after which a process counts as lost; less
        than the 100 after which JAX aborts.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout: int = 60


class Agreed(UserError):
    """An error that all processes raise alike, so that they can end together."""


@contextlib.contextmanager
def joined(address: Address | None, complain: Callable[[str], None]) -> Iterator[None]:
    """Runs its body in this process as one of many, or alone if there is no address.

    If the body fails, the process tells the others and exits without returning, because a normal
    exit would wait for them. It also exits if another process is lost.

    Args:
      address: Where the processes meet. No device may be used before this.
      complain: Reports a line to the user.

    Raises:
      UserError: If the processes do not find each other, or all raise the same error.
    """
    if address is None:
        yield
        return
    watch = _join(address, complain)
    if watch is None:
        try:
            yield
        finally:
            jax.distributed.shutdown()
        return
    try:
        try:
            _check_devices()
            with storage_errors():
                yield
            all_gather_text("end")  # keep watching while others still work
        except Agreed:
            watch.part()
            raise
        watch.part()
    except Agreed:
        raise
    except UserError as error:
        complain(str(error))
        watch.end(2, str(error))
    except KeyboardInterrupt:
        complain("interrupted")
        watch.end(130, "interrupted")
    except Exception as error:
        # Most likely another process has ended. If so, the watch names it, without a stack trace.
        watch.wait()
        traceback.print_exc()
        watch.end(1, f"{type(error).__name__}: {error}")


def is_coordinator() -> bool:
    """Returns whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def all_gather_text(text: str) -> list[str]:
    """Gathers a text from each process, ordered by process; all processes must call it."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    # Padded to a power of two, so that few programs are compiled.
    padded = np.zeros(1 << int(max(sizes.max() - 1, 0)).bit_length(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(rows, sizes, strict=True)]


def any_process(wish: bool) -> bool:
    """Returns whether ``wish`` is true in any process; all processes must call it."""
    if jax.process_count() == 1:
        return wish
    return bool(multihost_utils.process_allgather(np.array([wish])).any())


def run_on_all(do: Callable[[], Any]) -> Any:
    """Returns the result of ``do``; an error in one process is raised in all of them.

    Raises:
      UserError: If ``do`` raises one in any process.
    """
    try:
        result, said = do(), ""
    except UserError as error:
        if jax.process_count() == 1:
            raise
        result, said = None, str(error)
    for number, message in enumerate(all_gather_text(said)):
        if message:
            raise Agreed(message if said == message else f"process {number}: {message}")
    return result


def wait_for_all(what: str) -> None:
    """Waits once until all processes have called it; a collective would time out sooner."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"fedhelp/{what}", _LONGEST_WAIT * 1000)


def _client() -> Any:
    from jax._src import distributed  # the store is not public; Orbax does the same

    return distributed.global_state.client


def check_same(what: str, ours: str, differences: Callable[[str], str]) -> None:
    """Checks that a value is the same in all processes.

    Args:
      what: The name of the value, for the message.
      ours: The value in this process.
      differences: Takes the value of process 0, and describes how the one of this process differs.

    Raises:
      UserError: In all processes, if the value differs from that of process 0 in any of them.
    """

    def check() -> None:
        if ours != theirs:
            raise UserError(
                f"{what} must be the same in all processes; process {jax.process_index()} differs "
                f"from process 0 in {differences(theirs)}"
            )

    theirs = all_gather_text(ours if is_coordinator() else "")[0]
    run_on_all(check)


class _Watch:
    """Signals that this process is alive and watches the others, in background threads."""

    def __init__(self, timeout: float, complain: Callable[[str], None]):
        from jax._src import distributed

        self._client = _client()
        self._coordinator = str(distributed.global_state.coordinator_address)
        self._timeout = timeout
        self._pause = min(1.0, timeout / 10)
        self._complain = complain
        self._ending = threading.Lock()
        self._parted = threading.Event()
        self._answered = time.monotonic()
        _delay_abort()
        for target in (self._beat, self._guard):
            threading.Thread(target=target, daemon=True).start()

    def part(self) -> None:
        """Leaves the run, once all processes have come to the same end; all must call it."""
        self._parted.set()
        with contextlib.suppress(Exception):  # the coordinator may have left already
            jax.distributed.shutdown()

    def end(self, code: int, message: str) -> None:
        """Ends this process at once, and tells the others why."""
        with self._ending:  # never released, so that no other thread reports anything
            key = f"{_ENDED}/{jax.process_index()}"
            with contextlib.suppress(Exception):  # perhaps no other process is left
                self._client.key_value_set(key, " ".join(message.split())[:500])
            if is_coordinator():
                time.sleep(3 * self._pause)  # the store ends with this process
            _exit(code)

    def wait(self) -> None:
        """Waits long enough to notice the loss of another process, which ends this one."""
        time.sleep(self._timeout + 3 * self._pause)

    def _beat(self) -> None:
        me, beats = str(jax.process_index()), 0
        seen: dict[str, tuple[str, float]] = {}
        while not self._parted.wait(self._pause):
            beats += 1
            try:
                self._client.key_value_set(f"{_ALIVE}/{me}", str(beats), allow_overwrite=True)
                ended = self._client.key_value_dir_get(_ENDED)
                alive = self._client.key_value_dir_get(_ALIVE)
            except Exception:  # any error of the store means that process 0 does not answer
                self._lose("process 0 is lost")
                return
            now = self._answered = time.monotonic()
            for key, message in ended:
                self._lose(f"process {key.rsplit('/', 1)[-1]} has ended ({message})")
            for key, value in alive:
                number = key.rsplit("/", 1)[-1]
                if number not in seen or seen[number][0] != value:
                    seen[number] = value, now
                elif now - seen[number][1] > self._timeout:
                    self._lose(f"process {number} is lost")

    def _guard(self) -> None:
        """Detects the loss of process 0 when `_beat` gets no answer at all, as during an abort."""
        while not self._parted.wait(self._pause):
            silence = time.monotonic() - self._answered
            gone = silence > 2 * self._pause and not _listens(self._coordinator)
            if gone or silence > self._timeout + 2 * self._pause:
                self._lose("process 0 is lost")

    def _lose(self, what: str) -> None:
        with self._ending:
            if self._parted.is_set():
                return
            self._complain(
                f"{what}, so this process stops; the same command in all processes goes on from "
                "what is saved"
            )
            _exit(LOST)


def _join(address: Address, complain: Callable[[str], None]) -> _Watch | None:
    found = address[:3]
    if any(value is not None for value in found):
        _check(address)
    if jax.config.values["jax_cpu_collectives_implementation"] in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if "jax_enable_preemption_service" in jax.config.values:  # the run handles signals itself
        jax.config.update("jax_enable_preemption_service", False)
    # On a timeout, JAX would abort with a stack trace.
    timer = threading.Timer(_START_TIMEOUT, _give_up, [found, complain])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *found,
            cluster_detection_method=None if None in found else "deactivate",
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed: {_first_line(error)}") from None
    finally:
        timer.cancel()
    if jax.process_index() > 0:
        logging.getLogger("fedhelp_jax").setLevel(logging.ERROR)
    return None if jax.process_count() == 1 else _Watch(address.heartbeat_timeout, complain)


def _give_up(found: tuple[Any, ...], complain: Callable[[str], None]) -> None:
    where = f"is process 0 at {found[0]}, and " if found[0] else ""
    complain(
        f"--distributed: not all processes came within {_START_TIMEOUT} seconds; {where}did all "
        "start?"
    )
    _exit(2)


def _check_devices() -> None:
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        found = ", ".join(str(counts[i]) for i in sorted(counts))
        raise Agreed(f"--distributed: all processes need equally many devices; there are {found}")


def _listens(address: str) -> bool:
    """Returns whether something may listen at an address: False only if it refuses connections."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True  # no answer decides nothing
    return True


def _delay_abort() -> None:
    """Delays an abort by JAX, so that the watch can report first.

    JAX's client aborts the process as soon as process 0 is gone, and accepts no callback from
    Python. With ``sleep`` as the signal's handler, the aborting thread sleeps for as many seconds
    as the number of the signal, 6. Then the abort continues.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would wait for the others


def _check(address: Address) -> None:
    where, processes, number = address[:3]
    if where is None or processes is None or number is None:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together: give all three, "
            "or none where JAX finds them itself (SLURM, Open MPI, GKE, TPU pods)"
        )
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={where}: must be HOST:PORT; e.g. 10.0.0.1:1234")
    if not 0 <= number < processes:
        raise UserError(
            f"--process_id={number}: must be one of 0 to --num_processes - 1 = {processes - 1}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
