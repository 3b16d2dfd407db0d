"""The command line as tests use it: in this process, on runs that take seconds."""

import json
import shlex
from pathlib import Path
from typing import Any

import jax

from fedhelp_jax.cli.main import main

CONFIG = Path(__file__).parent / "tiny_config.py"


def fedhelp(command: str) -> int:
    """The exit code of a command."""
    return main(["fedhelp", *shlex.split(command)])


def train_command(workdir: Path, rest: str = "") -> str:
    """The arguments that train the tiny run; ``rest`` changes settings."""
    # Whoever came first in this process has chosen the number of devices.
    devices = f"--config.mapping.cpu_devices={jax.device_count()}"
    return f"train --config={CONFIG} --workdir={workdir} {devices} {rest}"


def train(workdir: Path, rest: str = "") -> int:
    """The exit code of a run."""
    return fedhelp(train_command(workdir, rest))


def refusal(capsys: Any, code: int) -> str:
    """The one line on stderr of a command that ended with exit code 2."""
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("fedhelp: ")
    return lines[0]


def read(path: Path) -> Any:
    """The JSON of a file, or of each line of a ``.jsonl`` one, without any NaN or infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]
    return json.loads(path.read_text(), parse_constant=refuse)
