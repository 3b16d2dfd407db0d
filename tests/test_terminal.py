"""A lost terminal, a reader that is gone or a full log stop nothing, in processes of their own."""

import io
import os
import pty
import subprocess
import sys

import pytest

from fedhelp_jax.core.terminal import wrapped

# Prints before and after something happens to its terminal, and writes a file as a run does.
_SCRIPT = """
import contextlib, os, signal, sys
from fedhelp_jax.core.terminal import dispensable_terminal, is_output_lost
with dispensable_terminal():
    print("before", flush=True)
    sys.stdin and sys.stdin.readline()
    with open(sys.argv[1], "w") as file:
        for number in (1, 2):
            with contextlib.suppress(OSError):
                os.write(number, b"by number\\n")
        os.kill(os.getpid(), signal.SIGHUP)
        print("after", "\\N{GREEK SMALL LETTER ALPHA}" * 10_000, flush=True)
        print("after", file=sys.stderr, flush=True)
        print("left in the buffer")
        file.write("whole")
    lost = is_output_lost()
sys.exit(4 if lost else 0)
"""


def assert_whole(path):
    assert path.read_text() == "whole"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    """What writes to stdout by its number does not write into the file that is opened next."""
    arguments = [sys.executable, "-c", _SCRIPT, str(tmp_path / "file")]
    script = ["bash", "-c", f'"$@" {closed}', "bash", *arguments]
    done = subprocess.run(script, input="\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path / "file")


def test_a_reader_that_is_gone(tmp_path):
    arguments = [sys.executable, "-c", _SCRIPT, str(tmp_path / "file")]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "before\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == "by number\nafter\n"
        assert process.wait(60) == 0
    assert_whole(tmp_path / "file")


def test_a_terminal_that_is_closed(tmp_path):
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-c", _SCRIPT, str(tmp_path / "file")]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        assert os.read(ours, 100).startswith(b"before")
        os.close(ours)
        process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert_whole(tmp_path / "file")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_is_told_once(tmp_path):
    arguments = [sys.executable, "-c", _SCRIPT, str(tmp_path / "file")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            arguments, input="\n", stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 4
    told = "fedhelp: stdout: No space left on device; it will be cut off"
    assert done.stderr.splitlines() == [told, "by number", "after"]
    assert_whole(tmp_path / "file")


def test_letters_that_the_terminal_lacks_are_spelled_out(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "file")],
        input="\n",
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert "after \\u03b1" in done.stdout and "left in the buffer" in done.stdout


@pytest.mark.parametrize(
    ("redirection", "code", "lines"), [(">&-", 0, 0), ("> /dev/full", 2, 1), ("| true", 0, 0)]
)
def test_a_command_that_only_prints(redirection, code, lines):
    """It fails if what was printed is lost, but not if nobody wanted to read it."""
    script = "from fedhelp_jax.cli.main import main_entry; main_entry()"
    command = f'"$@" {redirection}; exit "${{PIPESTATUS[0]}}"'
    arguments = ["bash", "-c", command, "bash", sys.executable, "-c", script, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == lines, done.stderr


class Screen(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self):
        return True


def test_lines_break_between_words_in_a_terminal_only(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = "teacher  a model-of-a-long-name said\nthis"
    assert wrapped(text, io.StringIO(), indent=9) == text
    found = wrapped(text, Screen(), indent=9)
    assert found == "teacher  a\n         model-of-a-long-name\n         said\nthis"
