"""What is wrong with a download ends in one line, whatever data set it is of."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from fedhelp_jax.data.images import load_images
from fedhelp_jax.errors import UserError


@pytest.fixture
def absurd(monkeypatch):
    """A picture of more than twice the pixels that Pillow takes for one."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = io.BytesIO()
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_the_reader_of_raw_files_refuses_an_absurdly_large_picture(tmp_path, absurd):
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("a.png", absurd)
    with pytest.raises(UserError, match=r"data.dir: image a.png in .*raw.zip cannot be decoded"):
        load_images(tmp_path / "raw.zip", ["a.png"], 8, cache_dir=str(tmp_path / "cache"))
