"""Gives every test two CPU devices, so that work is spread over devices in tests too."""

import os
from pathlib import Path

import jax
import pytest
from compiled_faster import FLAGS

from fedhelp_jax.core.compilation import protect_process
from fedhelp_jax.experiments import reporting

jax.config.update("jax_num_cpu_devices", 2)

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
protect_process()  # many tests compile functions of the package directly


LONG = ("slow", "torch", "multiprocess", "real_data")


def pytest_addoption(parser):
    """Adds an option that chooses among the long tests."""
    parser.addoption(
        "--long",
        default="all",
        help=f"which tests marked {', '.join(LONG)} to run: all, none, or K/N for those of every "
        "Nth file, the first of which is number K modulo N",
    )


def pytest_collection_modifyitems(config, items):
    """Marks tests that need real data or PyTorch by their fixtures, and chooses the long tests."""
    for item in items:
        for fixture, marker in (("real", "real_data"), ("torch", "torch")):
            if fixture in item.fixturenames:
                item.add_marker(marker)
    chosen = config.getoption("--long")
    if chosen == "all":
        return
    long = [item for item in items if any(map(item.get_closest_marker, LONG))]
    kept = set()
    if chosen != "none":
        number, parts = map(int, chosen.split("/"))
        files = sorted({item.path for item in long})
        kept = set(files[number % parts :: parts])
    left_out = {item for item in long if item.path not in kept}
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_user(tmp_path_factory):
    """Keeps tests out of the user's cache folder."""
    os.environ.setdefault("FEDHELP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real data; tests that ask for it are marked ``real_data``."""
    folder = os.environ.get("FEDHELP_DATA_DIR")
    if not folder:
        pytest.skip("FEDHELP_DATA_DIR, the folder of real images and models, is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def torch():
    """PyTorch; tests that ask for it are marked ``torch``."""
    return pytest.importorskip("torch", reason="PyTorch is not installed: no parity to check")


@pytest.fixture
def float64():
    """Enables float64 for comparisons over many steps, as Adam amplifies float32 rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", autouse=True)
def no_reports():
    """Lets commands end without a report, since drawing takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "report_at_the_end", lambda folder: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def kept_programs(tmp_path_factory):
    """Keeps compiled programs until the end, since many tests compile the same runs.

    Returns the environment variables with which a subprocess shares the programs. The workers of
    pytest-xdist share them too; each has a folder of its own in that of all.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_compilation_cache_max_size": -1,  # as in subprocesses, since a command may change it
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    return {name.upper(): str(value) for name, value in settings.items()}
