"""Starts MLServer on loopback for a test, and ends it whatever happens."""

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_RUNTIME = Path(__file__).with_name("runtime.py")
_START = 90.0  # seconds; a cold disk has half a hundred packages to read
# The package cannot be run by -m, and its command may not be on the path.
_ENTRY = "from mlserver.cli import main; main()"


class Served(NamedTuple):
    """A server that is ready.

    Attributes:
        url: Where it listens.
        model: Its one model.
        version: Of that model.
        log: JSON lines, one for each request: the number of images and the hash of each.
    """

    url: str
    model: str
    version: str
    log: Path

    def received(self) -> list[str]:
        """The hash of each image that was received so far."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        requests = [json.loads(line) for line in lines]
        assert all(request["images"] == len(request["sha256"]) for request in requests)
        return [sha for request in requests for sha in request["sha256"]]


def serve_python() -> str:
    """The Python that has MLServer; skips the test where there is none."""
    chosen = os.environ.get("FEDHELP_SERVE_PYTHON")
    if chosen:
        # Not resolved: a virtual environment's Python is a link.
        return os.path.abspath(shutil.which(chosen) or chosen)
    if importlib.util.find_spec("mlserver") is not None:
        return sys.executable
    pytest.skip(
        "MLServer is not installed: put tests/serve/requirements.txt into a virtual environment "
        "and name its Python in FEDHELP_SERVE_PYTHON"
    )


@contextlib.contextmanager
def mlserver(
    folder: Path, runtime: str, uri: Path, output: str, *, model: str = "classifier"
) -> Iterator[Served]:
    """A server of one model, killed with all its children when the test is through with it.

    Args:
        folder: An empty folder, for its settings and logs.
        runtime: Which class of ``runtime.py``.
        uri: The model file.
        output: The tensor that it returns.
        model: The model's name.
    """
    python = serve_python()
    http_port, grpc_port = _free_ports(2)
    served = Served(f"http://127.0.0.1:{http_port}", model, "v1", folder / "requests.jsonl")
    (folder / model).mkdir()
    shutil.copy(_RUNTIME, folder / model)
    _write(
        folder / "settings.json",
        host="127.0.0.1",
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_endpoint=None,
        parallel_workers=0,
        debug=False,
    )
    _write(
        folder / model / "model-settings.json",
        name=model,
        implementation=f"runtime.{runtime}",
        parameters={
            "uri": str(uri),
            "version": served.version,
            "extra": {"output": output, "log": str(served.log)},
        },
    )
    # Settings in the environment would win over those in the files.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLSERVER_")}
    printed = folder / "printed.txt"
    with printed.open("wb") as file:
        process = subprocess.Popen(
            [python, "-c", _ENTRY, "start", str(folder)],
            cwd=folder,
            env=kept | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        if not _becomes_ready(process, http_port, f"/v2/models/{model}/ready"):
            raise AssertionError(f"MLServer did not start: {printed.read_text()[-3000:]}")
        yield served
    finally:
        # It has nothing to save. The group outlives its leader until the last child is gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def _becomes_ready(process: subprocess.Popen[bytes], port: int, path: str) -> bool:
    # /v2/health/ready says yes before the first model is there.
    end = time.monotonic() + _START
    while time.monotonic() < end and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return True
        time.sleep(0.1)
    return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))
