"""What docs/extending.md shows is a file outside the checkout that a run can use by its names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CONFIG, fedhelp, read, refusal

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
LEAST = "--config.rounds=1 --config.data.image_size=8 --config.evaluate_every=1"


def write_page(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    (folder / "my_lab.py").write_text("\n\n".join(blocks))


@pytest.mark.slow
def test_all_four_are_used_without_touching_the_package(tmp_path, monkeypatch):
    write_page(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {
        "algorithm.name": "my_lab:fedclip",
        "algorithm.max_norm": "0.5",
        "model.small": "my_lab:tiny",
        "model.large": "my_lab:tiny",
        "data.name": "my_lab:scans",
    }
    flags = " ".join(f"--config.{key}={value}" for key, value in names.items())
    run = tmp_path / "run"
    assert fedhelp(f"train --config={CONFIG} --workdir={run} {LEAST} {flags}") == 0
    summary = read(run / "summary.json")
    assert (summary["algorithm"], summary["dataset"]) == ("my_lab:fedclip", "arrays")
    assert read(run / "config.json")["algorithm"]["settings"] == {"max_norm": 0.5}
    assert fedhelp(f"evaluate --workdir={run}") == 0
    more = flags.replace("my_lab:fedclip", "fedhelp").replace("--config.algorithm.max_norm=0.5", "")
    more += " --config.public.name=my_lab:tiles --config.teacher.name=my_lab:guess"
    assert fedhelp(f"train --config={CONFIG} --workdir={tmp_path / 'two'} {LEAST} {more}") == 0
    assert read(tmp_path / "two" / "summary.json")["teacher"] == "a guess"


def test_what_cannot_be_used_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    write_page(tmp_path)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for flag, words in (
        ("algorithm.name=my_lab:fedclop", ["my_lab has no fedclop"]),
        ("algorithm.name=my_lab:tiny", ["is no method", "@method"]),
        ("algorithm.name=broken:x", ["broken cannot be imported", "nowhere_to_be_found"]),
        ("algorithm.name=fedclip", ["must be one of fedhelp", "package.module:object"]),
        ("model.small=my_lab:LARGE_NETWORK", ["is no network"]),
    ):
        line = refusal(capsys, fedhelp(f"train --config={CONFIG} --workdir=x --config.{flag}"))
        for word in words:
            assert word in line, line


@pytest.mark.slow
def test_a_package_adds_to_the_lists_by_an_entry_point(tmp_path):
    write_page(tmp_path)
    about = tmp_path / "my_lab-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my_lab\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fedhelp_jax.algorithms]\nfedclip = my_lab:fedclip\n")
    code = "from fedhelp_jax.cli.main import main; main(['fedhelp', 'list', 'algorithms'])"
    path = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path = {path}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["fedclip", "FedAvg with clipped gradients on the small architecture."] in lines
