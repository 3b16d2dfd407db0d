"""Fixtures for real data, if there is any, and for its cache."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def real() -> Path:
    """Returns the folder of real data, or skips the test."""
    folder = os.environ.get("FEDHELP_DATA_DIR")
    if not folder:
        pytest.skip("FEDHELP_DATA_DIR is not set: no real data to try")
    return Path(folder)


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns a folder for thousands of decoded real images, shared by all tests."""
    return os.environ.get("FEDHELP_CACHE_DIR") or str(tmp_path_factory.mktemp("image_cache"))
