"""Every file in examples/ runs, for one round, as a user would run it."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from commands import fedhelp, read

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(set(EXAMPLES.glob("*.py")) - {EXAMPLES / "make_hospital.py"})
PAGE = EXAMPLES.parent / "docs/own-images.md"


# One round on a few small images, where the example has more of both.
ROUNDS = r"range\(\d+\)|config\.rounds, config\.batch_size = 5"
SMALLER = {
    r'load\("phantoms", (?:num_examples=400, image_size=16|seed=0)': (
        'load("phantoms", num_examples=120, image_size=8'
    ),
    "num_examples, config.data.image_size = 400, 16": (
        "num_examples, config.data.image_size = 120, 8"
    ),
    # Deep networks take a minute to compile; the README's demo has them.
    r"models.resnet\((?:20|32), ": "models.cnn((8, 32), ",
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path):
    source, count = re.subn(ROUNDS, _once, file.read_text())
    assert count == 1, "an example has one loop over rounds"
    for pattern, fewer in SMALLER.items():
        source = re.sub(pattern, fewer, source)
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


@pytest.mark.slow
def test_a_hospitals_folder_by_the_page_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_hospital = runpy.run_path(str(EXAMPLES / "make_hospital.py"))["main"]
    make_hospital(Path("hospital_x"), count=160)
    text = PAGE.read_text().replace("\\\n", " ").replace("configs/", f"{PAGE.parents[1]}/configs/")
    check, train = re.findall(r"^fedhelp ((?:data check|train) .*)$", text, re.M)
    assert fedhelp(check) == 0
    assert sorted(sheet.stem for sheet in Path("sheets").glob("*.png")) == sorted(
        {"central", "north", "coast", "valley"}
    )
    devices = f"--config.mapping.cpu_devices={jax.device_count()}"
    assert fedhelp(f"{train} --config.rounds=1 {devices}") == 0
    assert "gap, large - small" in capsys.readouterr().out
    summary = read(Path("runs/hospital_x/summary.json"))
    assert (summary["dataset"], summary["synthetic"]) == ("hospital_x", False)


def test_the_index_names_every_file():
    listed = re.findall(r"\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == [file.name for file in FILES]
