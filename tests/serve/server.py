"""Starts MLServer on loopback for a test, and stops it whatever happens."""

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
_START = 90.0  # seconds; some fifty packages may have to be read from a cold disk
# The package cannot be run with -m, and its command may not be on the path.
_ENTRY = "from mlserver.cli import main; main()"


class Served(NamedTuple):
    """A server that is ready.

    Attributes:
        url: Address of the server.
        model: Name of its only model.
        version: Version of the model.
        log: File of JSON lines, one per request, with the number of images and their hashes.
    """

    url: str
    model: str
    version: str
    log: Path

    def received(self) -> list[str]:
        """Returns the hash of each image received so far."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        requests = [json.loads(line) for line in lines]
        assert all(request["images"] == len(request["sha256"]) for request in requests)
        return [sha for request in requests for sha in request["sha256"]]


def serve_python() -> str:
    """Returns the Python that has MLServer; skips the test if there is none."""
    chosen = os.environ.get("FEDHELP_SERVE_PYTHON")
    if chosen:
        # The path is not resolved, since a virtual environment's Python is a link.
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
    """Runs a server with one model, and kills it with all its children at the end.

    Args:
        folder: An empty folder for the server's settings and logs.
        runtime: Name of a class in ``runtime.py``.
        uri: The model file.
        output: Name of the tensor that the model returns.
        model: Name of the model.
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
    # Settings in the environment would override those in the files.
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
        # The server has nothing to save. Its process group lives until the last child is gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def _becomes_ready(process: subprocess.Popen[bytes], port: int, path: str) -> bool:
    # /v2/health/ready reports success before the first model is loaded.
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
