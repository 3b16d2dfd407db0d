import io
import logging
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.cache import cache_folder
from fedhelp_jax.data.readers import images as module
from fedhelp_jax.data.readers.images import existing_path, load_images, resize_arrays
from fedhelp_jax.data.readers.listing import list_images

NAMES = ["images/a.jpg", "images/b.png", "c.jpeg"]


def picture(seed, mode="RGB", size=(20, 14)):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image, name):
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if name.endswith("png") else "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "images").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        image = picture(seed, "L" if name.endswith("png") else "RGB")
        (folder / name).write_bytes(encoded(image, name))
    return folder


@pytest.fixture
def archive(tmp_path, folder):
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in NAMES:
            file.write(folder / name, name)
        file.writestr("masks/a.png", b"not looked at")
    return path


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often anything was decoded."""
    calls = []
    original = module._decode_all

    def counting(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "_decode_all", counting)
    return calls


def found(source, table=None, ids=""):
    """Returns where the images of a table are."""
    if table is not None:
        table.write_text("\n".join(["image", *ids]) + "\n")
    entries = list_images(source, table, {"image": None}, ("data.path", "data.table"))
    return {entry.id: entry.image for entry in entries}


def test_images_are_found_in_folder_and_zip(folder, archive, tmp_path):
    expected = {"a": "images/a.jpg", "b": "images/b.png", "c": "c.jpeg"}
    for source in (folder, archive):
        assert found(source, tmp_path / "table.csv", "abc") == expected
        with pytest.raises(UserError, match="image d of .* is not in .* \\(1 of 4 are missing\\)"):
            found(source, tmp_path / "table.csv", "abcd")


def test_folder_and_zip_decode_alike(folder, archive, tmp_path):
    cache = str(tmp_path / "cache")
    one = load_images(folder, NAMES, 8, cache_dir=cache).images
    two = load_images(archive, NAMES, 8, cache_dir=cache).images
    assert one.shape == (3, 8, 8, 3) and one.dtype == np.uint8
    assert np.array_equal(one, two)
    assert np.array_equal(one[1, ..., 0], one[1, ..., 2])  # grey became RGB
    assert not np.array_equal(one[0, ..., 0], one[0, ..., 2])
    assert np.array_equal(load_images(folder, NAMES[::-1], 8, cache_dir=cache).images, one[::-1])


def test_resizing_is_antialiased_and_native_size_is_kept():
    stripes = np.zeros((1, 64, 64), np.uint8)
    stripes[:, :, ::2] = 255
    small = resize_arrays(stripes, 16)
    assert small.shape == (1, 16, 16, 3)
    assert np.all(np.abs(small.astype(int) - 127) <= 12)
    colour = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    assert np.array_equal(resize_arrays(colour, 9), colour)
    grey = resize_arrays(colour[..., :1], 9)
    assert np.array_equal(grey, np.repeat(colour[..., :1], 3, -1))


def test_cache_hit_is_equal_and_decodes_nothing(archive, tmp_path, decoded):
    first = load_images(archive, NAMES, 8, cache_dir=str(tmp_path / "cache")).images
    second = load_images(archive, NAMES, 8, cache_dir=str(tmp_path / "cache")).images
    assert np.array_equal(first, second)
    assert len(decoded) == 1
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npz"]


def test_cache_notices_what_has_changed(folder, archive, tmp_path, decoded):
    def load(source, names=NAMES, size=8):
        return load_images(source, names, size, cache_dir=str(tmp_path / "cache")).images

    before = load(folder)
    load(folder, size=9)
    load(folder, NAMES[:2])
    (folder / NAMES[0]).write_bytes(encoded(picture(99), NAMES[0]))
    after = load(folder)
    assert len(decoded) == 4
    assert not np.array_equal(before[0], after[0])
    load(archive)
    os.utime(archive, (1, 1))
    load(archive)
    assert len(decoded) == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "shape"])
def test_damaged_cache_is_silently_redone(archive, tmp_path, decoded, damage, caplog):
    first = load_images(archive, NAMES, 8, cache_dir=str(tmp_path / "cache")).images
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        content = content[:200]
    elif damage == "empty":
        content = bytearray()
    if damage == "shape":
        np.savez(file, images=first[:1])
    else:
        file.write_bytes(content)
    for _ in range(2):
        assert np.array_equal(
            load_images(archive, NAMES, 8, cache_dir=str(tmp_path / "cache")).images, first
        )
    assert len(decoded) == 2
    assert not caplog.records


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("FEDHELP_CACHE_DIR", raising=False)
    assert cache_folder(None) == tmp_path / "xdg" / "fedhelp_jax"
    monkeypatch.setenv("FEDHELP_CACHE_DIR", str(tmp_path / "env"))
    assert cache_folder(None) == tmp_path / "env"
    assert cache_folder(str(tmp_path / "key")) == tmp_path / "key"


def test_a_cache_that_cannot_be_written_is_done_without(archive, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        images = load_images(archive, NAMES, 8, cache_dir=str(tmp_path / "file")).images
    assert images.shape == (3, 8, 8, 3)
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_corrupt_image_is_named(folder, tmp_path, content):
    file = folder / NAMES[0]
    file.write_bytes(file.read_bytes()[:300] if content == "cut" else content)
    with pytest.raises(
        UserError, match="data.path: image images/a.jpg in .*pictures cannot be dec"
    ):
        load_images(folder, NAMES, 8, cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "x.zip").write_text("no zip")
    with pytest.raises(UserError, match="data.path: .*x.zip is neither a folder nor a zip file"):
        found(tmp_path / "x.zip")


def test_paths_that_are_missing():
    with pytest.raises(UserError, match="data.path is not set; it must name a folder"):
        existing_path(None, "data.path", "a folder")
    with pytest.raises(
        UserError, match="data.path: /no/where does not exist; it must name a folder"
    ):
        existing_path("/no/where", "data.path", "a folder")
