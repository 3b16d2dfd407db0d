"""One process at a time writes to a folder; what a dead one held is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
from commands import fedhelp, train_command
from commands import refusal as refused_command
from helpers import refusal

from fedhelp_jax.core import locks
from fedhelp_jax.core.locks import exclusive_lock, folder_lock

HOLD = """
import sys, time
from pathlib import Path
from fedhelp_jax.core.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]) / ".lock", "folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


class Other:
    """Another process that holds a folder until it is let go or killed."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def __str__(self) -> str:
        return f"process {self.process.pid} on {socket.gethostname()}"

    def release(self) -> None:
        self.process.communicate("")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def other(tmp_path):
    holder = Other(tmp_path)
    yield holder
    holder.kill()


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch):
    monkeypatch.setattr(locks, "_BEAT", 0.05)


def noted(folder: Path, pid: int, host: str) -> Path:
    path = folder / ".lock.holder"
    path.write_text(json.dumps({"pid": pid, "host": host}))
    return path


def hold(folder: Path) -> None:
    with folder_lock(folder):
        assert json.loads((folder / ".lock.holder").read_text())["pid"] == os.getpid()


def test_a_folder_that_another_process_writes_to_is_refused_by_its_id_and_host(tmp_path, other):
    message = refusal(lambda: hold(tmp_path))
    assert f"--workdir={tmp_path}: {other} writes to it" in message
    other.release()
    hold(tmp_path)
    assert not (tmp_path / ".lock.holder").exists()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, other, caplog):
    other.kill()
    assert (tmp_path / ".lock.holder").exists()
    hold(tmp_path)
    assert not caplog.records


def test_who_waits_is_told_once_and_gets_the_lock_then(tmp_path, other):
    said: list[str] = []
    let_go = threading.Event()
    timer = threading.Timer(0.7, lambda: (let_go.set(), other.release()))
    timer.start()
    with exclusive_lock(tmp_path / ".lock", "folder", said.append):
        assert let_go.is_set()  # the process itself may take longer to end
    assert said == [str(other)]
    timer.join()


def no_locks(self, *arguments, **options):
    raise NotImplementedError("FileSystem does not appear to support flock")


@pytest.mark.parametrize("reach", ["this host", "nowhere"])
def test_where_locks_do_not_reach_a_holder_elsewhere_is_seen_by_its_signs_of_life(
    tmp_path, monkeypatch, caplog, reach
):
    """As long as it renews its note it holds the folder; then it is taken over from."""
    if reach == "nowhere":
        monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    note = noted(tmp_path, 12, "node3")
    ended = threading.Event()
    alive = threading.Thread(target=locks._renew, args=(note, ended))
    alive.start()
    assert "process 12 on node3 writes to it" in refusal(lambda: hold(tmp_path))
    ended.set()
    alive.join()
    caplog.clear()
    hold(tmp_path)
    assert "process 12 on node3 held" in caplog.text and "taking over" in caplog.text


def test_the_holder_gives_signs_of_life(tmp_path):
    with folder_lock(tmp_path):
        first = locks._time(tmp_path / ".lock.holder")
        time.sleep(0.3)
        assert locks._time(tmp_path / ".lock.holder") != first


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}: cannot be written to" in refusal(lambda: hold(tmp_path / "file"))


@pytest.mark.parametrize("command", ["train", "evaluate", "sweep", "compare", "tune"])
def test_each_command_that_writes_refuses_a_folder_in_use(tmp_path, capsys, other, command):
    study = Path(__file__).parent / "tiny_study.py"
    whole = {
        "evaluate": f"evaluate --workdir={tmp_path}",
        "sweep": train_command(tmp_path, "--seeds=0:2").replace("train", "sweep", 1),
        "compare": f"compare --study={study} --workdir={tmp_path}",
        "tune": f"tune --study={study}:tuned --workdir={tmp_path}",
    }.get(command, train_command(tmp_path, "--overwrite"))
    if command == "evaluate":
        fedhelp_config(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    message = refused_command(capsys, fedhelp(whole))
    assert str(other) in message and str(tmp_path) in message
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    note = tmp_path / ".lock.holder"
    assert after | {note: 0} == before | {note: 0}


def fedhelp_config(folder: Path) -> None:
    """A run that another process has begun."""
    from fedhelp_jax.experiments import config as config_lib
    from fedhelp_jax.report import run_files

    run_files.write_json(folder / "config.json", config_lib.to_dict(config_lib.RunConfig()))
