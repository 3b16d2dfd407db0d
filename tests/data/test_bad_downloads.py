"""What is wrong with a download ends in one line, whatever data set it is of."""

import io
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import fedhelp, refusal
from PIL import Image
from tensorflow_datasets.core import file_adapters

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.locks import exclusive_lock
from fedhelp_jax.data.builders import BUILDERS, downloads, resumable_map
from fedhelp_jax.data.builders.base import decoded
from fedhelp_jax.data.builders.prepare import builder, names
from fedhelp_jax.data.readers.images import load_images

# A configuration of each builder.
NAMES = [next(full for full in names() if full.partition("/")[0] == name) for name in BUILDERS]


def no_space(*args, **options):
    raise OSError(28, "No space left on device")


def write_zip(path, name="a.png", data=b"x"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return path


def write_tar_gz(path):
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("images/a.png")
        info.size = 10**5
        archive.addfile(info, io.BytesIO(np.random.default_rng(0).bytes(10**5)))
    return path


def encrypt(path):
    """Says of the one file that it is encrypted."""
    data = bytearray(path.read_bytes())
    for start, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(start) + place] |= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


BAD = {
    "a name outside": (
        lambda f, _: write_zip(f / "x.zip", "../a.png"),
        "holds '../a.png', which lies outside of its folder",
    ),
    "a bomb": (
        lambda f, patch: (
            patch.setattr(downloads, "_BOMB_BYTES", 10**6),
            write_zip(f / "x.zip", "a.png", bytes(2 * 10**6)),
        ),
        "would unpack to 2000000 or more",
    ),
    "a truncated .tar.gz": (lambda f, _: cut(write_tar_gz(f / "x.tar.gz")), "x.tar.gz is damaged"),
    "a truncated zip": (lambda f, _: cut(write_zip(f / "x.zip", data=b"x" * 9)), "x.zip is damag"),
    "a full disk": (
        lambda f, patch: (
            write_tar_gz(f / "x.tar.gz"),
            patch.setattr(downloads, "_copy", no_space),
        ),
        "No space left on device; what is made so far is kept in",
    ),
    "a link to nowhere": (lambda f, _: (f / "a.png").symlink_to(f / "b.png"), "a.png in .* cannot"),
    "nothing of its own": (lambda f, _: (f / "notes.txt").write_text("-"), "--manual_dir"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_of_every_data_set(tmp_path, capsys, monkeypatch, name, case):
    spoil, words = BAD[case]
    (tmp_path / "download").mkdir()
    spoil(tmp_path / "download", monkeypatch)
    code = fedhelp(f"data prepare {name} --manual_dir={tmp_path}/download --data_dir={tmp_path}/d")
    with pytest.raises(UserError, match=words):
        raise UserError(refusal(capsys, code))
    assert not list(tmp_path.glob("d/*/**/*.array_record*"))


def test_a_file_of_an_encrypted_archive(tmp_path):
    encrypt(write_zip(tmp_path / "x.zip"))
    with downloads.Download(tmp_path, tmp_path / "scratch") as download:
        with pytest.raises(UserError, match=r"a.png in .* cannot be read: .*encrypted"):
            download.read("a.png")


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
    with pytest.raises(UserError, match=r"data.path: image a.png in .*raw.zip cannot be decoded"):
        load_images(tmp_path / "raw.zip", ["a.png"], 8, cache_dir=str(tmp_path / "cache"))


def test_a_picture_of_a_download_that_is_absurdly_large(absurd):
    with pytest.raises(UserError, match=r"--manual_dir: x/a.png cannot be decoded: Image size"):
        decoded(absurd, "x/a.png")


# --- where the prepared set is written ---


@pytest.fixture
def breast(tmp_path):
    """A small BreastMNIST, and the command that prepares it."""
    (tmp_path / "download").mkdir()
    arrays = {}
    for split in ("train", "val", "test"):
        arrays |= {f"{split}_images": np.zeros((3, 28, 28), np.uint8)}
        arrays |= {f"{split}_labels": np.ones((3, 1), np.uint8)}
    np.savez(tmp_path / "download" / "breastmnist.npz", **arrays)
    return (
        f"data prepare medmnist/breastmnist_28 --manual_dir={tmp_path}/download --allow_repacked "
        f"--data_dir={tmp_path}/prepared"
    )


def no_space_for_records(path, iterator):
    """As the C++ of array_record says it."""
    list(iterator)
    raise RuntimeError("write() failed: No space left on device; writing x; at byte 200000")


@pytest.mark.parametrize(
    ("where", "name", "full"),
    [
        (resumable_map, "write_npz", no_space),
        (file_adapters.ArrayRecordFileAdapter, "write_examples", no_space_for_records),
    ],
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    breast, capsys, monkeypatch, where, name, full
):
    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        assert "No space left on device; what is made so far is" in refusal(capsys, fedhelp(breast))
    assert fedhelp(breast) == 0
    assert "(train 3, validation 3, test 3)" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_one_line(breast, capsys, tmp_path):
    (tmp_path / "prepared").write_text("in the way")
    message = refusal(capsys, fedhelp(breast))
    assert f"{tmp_path / 'prepared'}" in message and "cannot be written to" in message


class Told(io.StringIO):
    """Standard output that reports when a text is written to it."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.written = text, threading.Event()

    def write(self, more: str) -> int:
        count = super().write(more)
        if self.text in self.getvalue():
            self.written.set()
        return count


def test_a_second_preparation_waits_and_finds_the_set_prepared(breast, monkeypatch, tmp_path):
    """The first one is made to begin when the second has said that it waits."""
    lock = tmp_path / "prepared" / ".unfinished" / "medmnist.lock"
    output = Told("waiting")
    monkeypatch.setattr(sys, "stdout", output)
    seconds = []
    with exclusive_lock(lock, "prepared"):
        second = threading.Thread(target=lambda: seconds.append(fedhelp(breast)))
        second.start()
        assert output.written.wait(timeout=60)
        assert f"process {os.getpid()} on " in output.getvalue()
        prepared = str(tmp_path / "prepared")
        finished = Path(builder("medmnist/breastmnist_28", prepared).data_path)
        finished.mkdir(parents=True)
    second.join()
    assert seconds == [0]
    assert f"{finished} is there already" in output.getvalue()


def test_an_absurdly_large_npz_file(breast, capsys, monkeypatch):
    monkeypatch.setattr(downloads, "_BOMB_BYTES", 1000)
    monkeypatch.setattr(downloads, "_BOMB_RATIO", 0.5)
    assert "breastmnist.npz of " in refusal(capsys, fedhelp(breast))
