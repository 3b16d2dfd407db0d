"""Real data, where there is any, and a cache for it."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def real() -> Path:
    """The folder of real data."""
    folder = os.environ.get("FEDHELP_DATA_DIR")
    if not folder:
        pytest.skip("FEDHELP_DATA_DIR is not set: no real data to try")
    return Path(folder)


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder to decode thousands of real images into, once for all tests."""
    return os.environ.get("FEDHELP_CACHE_DIR") or str(tmp_path_factory.mktemp("image_cache"))
