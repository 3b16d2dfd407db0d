"""Runs the command line in the test process, on runs that take seconds."""

import json
import shlex
from pathlib import Path
from typing import Any

import jax

from fedhelp_jax.cli.main import main

CONFIG = Path(__file__).parent / "tiny_config.py"


def fedhelp(command: str) -> int:
    """Runs a command and returns its exit code."""
    return main(["fedhelp", *shlex.split(command)])


def train_command(workdir: Path, rest: str = "") -> str:
    """Returns the arguments that train the tiny run; ``rest`` changes settings."""
    # The number of devices is fixed once JAX has started in this process.
    devices = f"--config.mapping.cpu_devices={jax.device_count()}"
    return f"train --config={CONFIG} --workdir={workdir} {devices} {rest}"


def train(workdir: Path, rest: str = "") -> int:
    """Trains the tiny run and returns the exit code."""
    return fedhelp(train_command(workdir, rest))


def refusal(capsys: Any, code: int) -> str:
    """Returns the single line on stderr of a command that ended with exit code 2."""
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("fedhelp: ")
    return lines[0]


def read(path: Path) -> Any:
    """Returns the JSON in a file, or in each line of a ``.jsonl``; refuses NaN and infinities."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]
    return json.loads(path.read_text(), parse_constant=refuse)
