"""Alternates rivals in separate processes, so that their thread pools do not compete.

A worker is a module that calls `serve`. `Worker` starts it and sends it questions, one per line,
each of which it answers by one line of JSON. While one worker runs, the others wait for input,
which costs nothing.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Worker:
    """A process that runs ``python -m MODULE JSON`` and answers questions.

    Attributes:
      about: The information that the worker gives about itself.
    """

    def __init__(
        self, module: str, options: Mapping[str, Any], python: str | os.PathLike = sys.executable
    ):
        self._process = subprocess.Popen(
            [os.fspath(python), "-m", module, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._read()

    def ask(self, what: str) -> dict[str, Any]:
        """Returns the answer to ``what``, one of the worker's questions."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self._process.wait()}; see above")
        return json.loads(line)


def serve(about: Mapping[str, Any], questions: Mapping[str, Callable[[], Any]]) -> None:
    """Prints ``about``, then answers questions until the input ends; all else goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(questions[line.strip()]()), file=answers, flush=True)


def peak_gib() -> float:
    """Returns the peak memory of this process in GiB.

    ``getrusage`` is not used on Linux, where children inherit its value from their parent.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def device_peak_gib() -> float | None:
    """Returns the peak memory of JAX's first device in GiB; None if the device does not tell."""
    import jax  # imported here, since workers of other frameworks have none

    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30


def alternate(
    workers: Mapping[str, Worker], repeats: int, what: str = "round"
) -> dict[str, list[float]]:
    """Returns the seconds of each worker's rounds, ``repeats`` of them after one warm-up round.

    A round is the worker's answer to the question ``what``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.ask(what)
    for _ in range(repeats):
        for name, worker in workers.items():
            seconds[name].append(worker.ask(what)["seconds"])
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Returns median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
