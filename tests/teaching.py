"""Runs ``fedhelp teach`` for tests, on tiny public images and with a server on loopback."""

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import lmdb
import numpy as np
from commands import fedhelp
from foundation_server import FoundationServer

from fedhelp_jax.data.types import image_sha256
from fedhelp_jax.teachers.store import decode

CONFIG = Path(__file__).parent / "teach_config.py"
BATCH = 4
COUNT, DISTINCT = 40, 34
_ENTRY = """\
import resource, signal, sys
# A shell's background job, which the tests may be, is started with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
if limit := int(sys.argv.pop(1)):  # bytes that no file may grow beyond
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from fedhelp_jax.cli.main import main_entry
main_entry()
"""


class Study:
    """A folder with public images, some of them duplicated, and commands that ask about them."""

    def __init__(self, folder: Path, server: FoundationServer, size: int = 12):
        self.folder, self.server = folder, server
        self.store = folder / "store"
        self.labels = folder / "labels.txt"
        self.label_names = [f"class {number}" for number in range(server.classes)]
        self.labels.write_text("\n".join(self.label_names))
        rng = np.random.default_rng(7)
        images = rng.integers(0, 256, (COUNT, size, size, 3), dtype=np.uint8)
        images[10:16] = images[:6]
        self.publish(images)

    def publish(self, images: np.ndarray) -> None:
        """Writes the public images, uint8 ``[P, H, W, 3]``, labelled with the model's classes."""
        self.images = images
        self.public = self.folder / "public.npz"
        labels = np.arange(len(images)) % len(self.label_names)
        np.savez(self.public, images=images, labels=labels, label_names=self.label_names)

    @property
    def sha256(self) -> list[str]:
        """The hash of each public image."""
        return [image_sha256(image) for image in self.images]

    def command(self, rest: str = "", name: str = "teach") -> str:
        """Returns the arguments of a command; ``rest`` changes settings."""
        return (
            f"{name} --config={CONFIG} --config.public.path={self.public} "
            f"--config.teacher.url={self.server.url} --config.teacher.labels={self.labels} "
            f"--config.teacher.store={self.store} "
            f"--config.mapping.cpu_devices={jax.device_count()} {rest}"
        )

    def teach(self, rest: str = "") -> int:
        """Runs the command in this process and returns its exit code."""
        return fedhelp(self.command(rest))

    @contextlib.contextmanager
    def process(self, rest: str = "", file_limit: int = 0) -> Iterator[subprocess.Popen[str]]:
        """Runs the command in a separate process, which is killed at the end of the context."""
        process = subprocess.Popen(
            [sys.executable, "-c", _ENTRY, str(file_limit), *shlex.split(self.command(rest))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)

    def assert_stored_rightly(self, count: int = DISTINCT) -> None:
        """Checks that the store holds ``count`` answers, each equal to what the server answers."""
        expected = dict(zip(self.sha256, self.server.expected(self.images), strict=True))
        found = stored(self.store)
        assert len(found) == count
        for sha, answer in found.items():
            np.testing.assert_array_equal(answer, expected[sha])

    def files(self) -> bytes:
        """Returns the names and contents of all files in the folder, to search them for a key."""
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        return b"\n".join(str(path).encode() + b"\n" + path.read_bytes() for path in found)


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Returns all answers in a store by image hash, read without the `AnswerStore`."""
    found = {}
    with (
        lmdb.open(str(folder), readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        for key, record in transaction.cursor():
            if key.startswith(b"a"):
                found[key[-32:].hex()] = decode(record).answer
    return found
