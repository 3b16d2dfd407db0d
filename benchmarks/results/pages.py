"""The files in docs/results that are made from the summaries there."""

import json
import re
from pathlib import Path

from benchmarks.results.figures import drawn
from benchmarks.results.tables import guard_record, tables
from fedhelp_jax.typing import JsonObject

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def generated(folder: Path = RESULTS) -> dict[str, str]:
    """Returns the content of each file that the summaries in a folder determine, by its name."""
    summaries = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    files = {}
    for name, found in summaries.items():
        figures = drawn(found)
        files[f"{name}.md"] = _page(name, found, list(figures))
        files |= {figure_name(name, data): svg for data, svg in figures.items()}
    return files | {"guard.md": f"# The guard's record\n\n{guard_record(summaries)}\n"}


def figure_name(study: str, data: str) -> str:
    """Returns the name of the file with a figure."""
    return re.sub(r"[^\w.-]+", "_", f"{study}_{data}.svg")


def _page(name: str, found: JsonObject, figures: list[str]) -> str:
    images = [f"![Gains on {data}]({figure_name(name, data)})" for data in figures]
    return "\n\n".join([f"# The tables of `{name}`", *images, tables(found)]) + "\n"
