"""Builds the report of one run, of several beside each other, or of a sweep."""

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from fedhelp_jax.report import run_files
from fedhelp_jax.report.page.files import FOLDER, PAGE, Files
from fedhelp_jax.report.page.one_run import page_of_run
from fedhelp_jax.report.page.several_runs import page_of_runs, page_of_sweep
from fedhelp_jax.report.run_data import find_runs, read_run, read_runs, read_sweep


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    changed: Callable[[Path], Sequence[tuple[str, str, str]]],
) -> Path:
    """Writes ``report.html``, and its figures and numbers to the folder ``report``.

    Args:
      folders: Run folders, or folders that hold runs at any depth (studies).
      out: The folder to write to.
      changed: Returns the settings of a run folder that are not the defaults: key, value, default.

    Returns:
      The path of the page.

    Raises:
      UserError: If there is no run in the folders.
    """
    found = find_runs(folders)
    sweep = read_sweep(folders[0]) if len(folders) == 1 and not found else None
    files = Files(out / FOLDER)
    if sweep is not None:
        page = page_of_sweep(sweep, files)
    elif len(found) == 1:
        page = page_of_run(read_run(found[0]), changed(found[0]), files)
    else:
        page = page_of_runs(read_runs(found, folders), files, out)
    # Imported here because only this needs it.
    from jinja2 import Environment, StrictUndefined

    source = (
        resources.files("fedhelp_jax.report.page")
        .joinpath("page.html.jinja")
        .read_text(encoding="utf-8")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    run_files.write_text(out / PAGE, environment.from_string(source).render(page=page) + "\n")
    return out / PAGE
