"""Every Python block of the documentation runs as it stands."""

import re
from pathlib import Path

import jax
import pytest
from commands import fedhelp, refusal

from fedhelp_jax.experiments.config import default_config, validate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block):
    names = {"__name__": "documentation", "config": default_config()}
    exec(compile(block, "documentation", "exec"), names)
    # A block that changes settings is a part of a config file.
    validate(names["config"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_at_most_100_characters_wide(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    wide = [line for line in text.splitlines() if len(line) > 100 and not line.startswith("|")]
    assert not wide


def test_the_commands_of_the_papers_tasks_go_as_far_as_the_data(tmp_path, monkeypatch, capsys):
    """There is no data here, which is all that they lack."""
    text = (ROOT / "docs/datasets.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(fedhelp train --config=configs/.*workdir.*name=tfds:.*)$", text, re.M)
    assert len(commands) == 5
    monkeypatch.setenv("FEDHELP_DATA_DIR", str(tmp_path))
    for command in commands:
        command = command.replace("PREPARED", str(tmp_path)).replace("=runs/", f"={tmp_path}/runs/")
        command = command.replace("--config=", f"--config={ROOT}/", 1)
        devices = f"--config.mapping.cpu_devices={jax.device_count()}"
        code = fedhelp(f"{command.removeprefix('fedhelp ')} {devices}")
        name = re.findall("data.name=tfds:([a-z0-9_/]+)", command)[0]
        assert f"data.name: {name} is not prepared in" in refusal(capsys, code)


def test_every_data_set_has_a_section():
    """With where to get it, a command that names what there is, and the licence."""
    from fedhelp_jax.data.builders.prepare import names

    sections = dict(
        re.findall(
            r"^## (\w+)\n(.*?)(?=^## |\Z)", (ROOT / "docs/datasets.md").read_text(), re.S | re.M
        )
    )
    assert {name.split("/")[0] for name in names()} == set(sections)
    for text in sections.values():
        (prepared,) = re.findall(r"- Command: `fedhelp data prepare (\S+) --manual_dir", text)
        assert prepared in names()
        assert "- Where: " in text and "- Licence: " in text
