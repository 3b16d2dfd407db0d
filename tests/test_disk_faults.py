"""What the disk refuses is one line and exit code 2, and the same command goes on once it can."""

import contextlib
import errno
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import fedhelp, read, refusal, train, train_command
from helpers import use_tiny_networks

from fedhelp_jax.core import storage
from fedhelp_jax.core.compilation import keep_programs
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.storage import StorageError, append_line, replaced, storage_errors
from fedhelp_jax.experiments import runner
from fedhelp_jax.experiments.sweep_folder import finished_runs
from fedhelp_jax.report import run_files
from fedhelp_jax.teachers.base import Fingerprint
from fedhelp_jax.teachers.store import AnswerStore, Precision

TESTS = Path(__file__).parent
SMALL = "--config.algorithm.name=local --config.rounds=3 --config.checkpoint_every=1"


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as with ``ulimit -f``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- writing a file ---


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(StorageError, match=f"^{path}: File too large$"), file_size_limit(10):
        with replaced(path) as beside:
            beside.write_bytes(bytes(100))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with replaced(path) as beside:
        beside.write_text("new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "gone" / "file"
    with pytest.raises(StorageError, match=f"^{path}: No such file or directory$"):
        append_line(path, "line")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EDQUOT, "", "file"), "file: Disk quota exceeded"),
        (OSError(errno.EROFS, "Read-only file system"), "[Errno 30] Read-only file system"),
        (ValueError("write failed:\n No space left on device"), "write failed: No space left on"),
    ],
)
def test_faults_of_the_disk_are_told_by_whatever_is_raised(error, line):
    with pytest.raises(StorageError) as told, storage_errors():
        raise error
    assert str(told.value).startswith(line) and "\n" not in str(told.value)


@pytest.mark.parametrize("error", [ValueError("ours"), FileNotFoundError(2, ""), UserError("x")])
def test_other_errors_are_left_alone(error):
    with pytest.raises(type(error)) as raised, storage_errors():
        raise error
    assert raised.value is error


# --- a run ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_networks(patch)
        workdir = tmp_path_factory.mktemp("finished") / "run"
        assert train(workdir, SMALL) == 0
        yield workdir


def results(workdir: Path) -> list:
    summary = read(workdir / "summary.json")
    return [summary["per_client"], [row["loss"] for row in read(workdir / "metrics.jsonl")]]


@pytest.mark.slow
@pytest.mark.parametrize(("round", "name"), [(0, "config.json"), (2, "checkpoints/2")])
def test_a_run_that_the_disk_stops_goes_on_to_the_same_end(
    finished, tmp_path, capsys, monkeypatch, round, name
):
    """From the beginning, and from the line about a round on."""
    workdir, append = tmp_path / "run", storage.append_line
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:

        def append_then_limit(path, line):
            append(path, line)
            if json.loads(line)["round"] == round:
                stack.enter_context(file_size_limit(2000))

        patch.setattr(run_files, "append_line", append_then_limit)
        if not round:
            stack.enter_context(file_size_limit(100))
        code = train(workdir, SMALL)
    assert f"{workdir / name}: File too large; " in refusal(capsys, code)
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name]
    assert train(workdir, SMALL) == 0
    assert results(workdir) == results(finished)
    assert not list((workdir / "checkpoints").glob("unreadable*"))


@pytest.mark.slow
def test_sums_that_find_no_room_leave_no_checkpoint(finished, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fedhelp_jax.experiments.checkpoint._write_sums", full)
        assert f"{workdir / 'checkpoints' / '1'}: No space left" in refusal(
            capsys, train(workdir, SMALL)
        )
    assert list((workdir / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_a_run_goes_on_without_its_terminal(finished, tmp_path, kept_programs):
    """A hangup, a reader of stdout that is gone, and a closed stderr."""
    workdir = tmp_path / "run"
    script = [sys.executable, str(TESTS / "tiny_fedhelp.py"), "SIGHUP", "after-row", "2"]
    command = [*script, *shlex.split(train_command(workdir, SMALL))]
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        ["bash", "-c", '"$@" 2>&-', "bash", *command],
        stdout=theirs,
        timeout=300,
        env=os.environ | kept_programs,
    )
    os.close(theirs)
    assert done.returncode == 0
    assert results(workdir) == results(finished)


def test_a_full_disk_ends_a_study_at_once(tmp_path, capsys, monkeypatch):
    calls = []

    def train_on_a_full_disk(config, folder, *, split, tells_plan):
        calls.append(folder)
        full()

    monkeypatch.setattr(runner, "train", train_on_a_full_disk)
    code = fedhelp(f"compare --study={TESTS / 'tiny_study.py'} --workdir={tmp_path}")
    assert "No space left on device" in refusal(capsys, code)
    assert len(calls) == 1


# --- sweeps, stores, caches ---


def test_a_line_of_a_sweep_that_lacks_only_its_end_is_not_counted(tmp_path):
    line = {"fingerprint": "a", "split": "test", "sources": {}}
    whole, cut = json.dumps(line), json.dumps(line | {"fingerprint": "b"})
    (tmp_path / "runs.jsonl").write_text(f"{whole}\n{cut}")
    assert set(finished_runs(tmp_path, "test")) == {"a"}
    assert (tmp_path / "runs.jsonl").read_text() == f"{whole}\n"


def test_a_store_that_finds_no_room_can_be_made_later(tmp_path):
    def put() -> None:
        with AnswerStore(
            tmp_path / "store", Fingerprint("m", "1", "", ()), Precision(), write=True
        ) as store:
            store.put(["00" * 32], np.zeros((1, 3), np.float32))

    with pytest.raises(UserError, match="cannot be used"), file_size_limit(5000):
        put()
    put()


def test_programs_that_cannot_be_kept_are_a_warning(tmp_path, caplog):
    before = jax.config.values["jax_compilation_cache_dir"]
    (tmp_path / "file").write_text("in the way")
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        keep_programs(tmp_path / "file" / "compiled")
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    (record,) = caplog.records
    assert "compiled programs are not kept" in record.getMessage()
