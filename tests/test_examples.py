"""Every file in examples/ runs, for one round, as a user would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path):
    source, count = re.subn(
        r"range\(\d+\)|config\.rounds, config\.batch_size = 5", _once, file.read_text()
    )
    assert count == 1, "an example has one loop over rounds"
    copy = tmp_path / file.name
    copy.write_text(source)
    done = subprocess.run([sys.executable, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def _once(match: re.Match[str]) -> str:
    return re.sub(r"\d+", "1", match.group(0))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_fits_on_a_screen(file):
    assert len(file.read_text().splitlines()) <= 60


def test_the_index_names_every_file():
    listed = re.findall(r"\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == [file.name for file in FILES]
