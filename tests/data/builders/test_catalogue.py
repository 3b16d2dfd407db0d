"""A set of TFDS's catalogue: CIFAR-100 in a small copy, its binary files to the letter."""

import builtins
import io
import sys

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from commands import fedhelp, refusal
from PIL import Image
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.image_classification import cifar

from fedhelp_jax.data.builders import catalogue

COUNTS = {"train": 5, "test": 3}


def pixels(split, i):
    return np.random.default_rng([len(split), i]).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def labels(split, i):
    """Coarse and fine."""
    return (i + len(split)) % 20, (17 * i + 3) % 100


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """What TFDS would have downloaded and unpacked."""
    folder = tmp_path / "unpacked" / "cifar-100-binary"
    folder.mkdir(parents=True)
    for split, count in COUNTS.items():
        # Two bytes of labels, then red, green and blue, row by row.
        rows = [
            bytes(labels(split, i)) + pixels(split, i).transpose(2, 0, 1).tobytes()
            for i in range(count)
        ]
        (folder / f"{split}.bin").write_bytes(b"".join(rows))
    for kind, count in (("coarse", 20), ("fine", 100)):
        names = "".join(f"{kind}_{i}\n" for i in range(count))
        (folder / f"{kind}_label_names.txt").write_text(names)
    monkeypatch.setattr(
        tfds.download.DownloadManager, "download_and_extract", lambda self, url: folder.parent
    )
    return folder


@pytest.fixture
def without_tensorflow(monkeypatch):
    """The builder opens its files and encodes images by TensorFlow, which is not needed for it."""

    class Gfile:
        GFile = staticmethod(builtins.open)

    load = cifar._load_data

    def load_encoded(*arguments):
        for found, image in load(*arguments):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            file.seek(0)
            yield found, file

    stand_in = type("tf", (), {"io": type("io", (), {"gfile": Gfile})})
    monkeypatch.setattr(cifar, "tf", stand_in)
    monkeypatch.setattr(cifar, "_load_data", load_encoded)


@pytest.fixture
def command(tmp_path):
    return f"data prepare cifar100 --data_dir={tmp_path}/data"


@pytest.mark.usefixtures("archive", "without_tensorflow")
def test_it_is_prepared_and_read_back_equal(command, tmp_path, capsys):
    assert fedhelp(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        "cifar100 is of TFDS's catalogue: prepared by its own builder, downloads in "
        f"{tmp_path}/data/downloads"
    )
    assert out[1].startswith(f"written: {tmp_path}/data/cifar100/") and len(out) == 2
    for split, count in COUNTS.items():
        source = tfds.data_source("cifar100", split=split, data_dir=f"{tmp_path}/data")
        found = {example["id"].decode(): example for example in source}
        assert sorted(found) == [f"{split}_{i:05}" for i in range(count)]
        for i in range(count):
            example = found[f"{split}_{i:05}"]
            np.testing.assert_array_equal(example["image"], pixels(split, i))
            assert (example["coarse_label"], example["label"]) == labels(split, i)
    assert fedhelp(command) == 0
    assert "is there already" in capsys.readouterr().out
    assert "tensorflow" not in sys.modules


@pytest.mark.usefixtures("archive")
def test_without_tensorflow_it_is_one_line(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert (
        "cifar100 of TFDS's catalogue needs TensorFlow to be prepared: pip install tensorflow, or "
        "prepare it elsewhere with file_format=array_record and copy the folder"
    ) in refusal(capsys, fedhelp(command))


def test_without_a_network_it_is_one_line(command, capsys, monkeypatch):
    def no_network(*args, **options):
        assert downloader.MAX_RETRIES == 4
        raise requests.ConnectionError("Failed to resolve 'www.cs.toronto.edu'")

    monkeypatch.setattr(downloader, "_open_url", no_network)
    line = refusal(capsys, fedhelp(command))
    assert "cifar100 of TFDS's catalogue cannot be prepared: Failed to resolve 'www.cs" in line
    assert downloader.MAX_RETRIES == 10


class Download:
    """What answers with another file than the published one."""

    url, headers = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", {}

    def __enter__(self):
        return self, [b"another file"]

    def __exit__(self, *_): ...


def test_another_file_than_tfds_expects_is_one_line(command, capsys, monkeypatch):
    monkeypatch.setattr(downloader, "_open_url", lambda url, **options: Download())
    assert "has wrong checksum" in refusal(capsys, fedhelp(command))


@pytest.mark.usefixtures("archive", "without_tensorflow")
def test_a_full_disk_is_one_line(command, capsys, monkeypatch):
    def full(path, iterator):
        raise RuntimeError("write() failed: No space left on device; writing x")

    monkeypatch.setattr(
        tfds.core.file_adapters.ArrayRecordFileAdapter, "write_examples", staticmethod(full)
    )
    assert "write() failed: No space left on device" in refusal(capsys, fedhelp(command))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar100/x", "'x' is not a configuration of cifar100"),
        ("cifar10_corrupted/fog", "did you mean fog_"),
        ("chexpert", "--manual_dir is missing: You must register and agree to user agreement"),
        ("cifar1000", "'cifar1000' is not a data set; see fedhelp data list"),
        ("fed_isic", "'fed_isic' is not a data set; did you mean fed_isic2019?"),
    ],
)
def test_bad_names_are_one_line(capsys, tmp_path, name, words):
    command = f"data prepare {name} --data_dir={tmp_path}"
    assert words in refusal(capsys, fedhelp(command))


def test_a_set_in_files_of_another_format_is_one_line(capsys, tmp_path, monkeypatch):
    made = tfds.builder("cifar100", data_dir=tmp_path, file_format="tfrecord")
    made.info.set_splits(tfds.core.splits.SplitDict([]))
    (tmp_path / "cifar100" / "3.0.2").mkdir(parents=True)
    made.info.write_to_directory(tmp_path / "cifar100" / "3.0.2")
    line = refusal(capsys, fedhelp(f"data prepare cifar100 --data_dir={tmp_path}"))
    assert "cifar100 of TFDS's catalogue cannot be prepared: " in line and "TFRECORD" in line
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    assert fedhelp("data describe cifar100") == 0


def test_it_is_described_as_tfds_does(capsys):
    assert fedhelp("data describe cifar100") == 0
    out = capsys.readouterr().out
    for words in (
        "This dataset is just like the CIFAR-10",
        "homepage: https://www.cs.toronto.edu/~kriz/cifar.html",
        "licence: see the homepage",
        "coarse_label: ClassLabel(shape=(), dtype=int64, num_classes=20)",
        "@TECHREPORT{Krizhevsky09learningmultiple",
    ):
        assert words in out


def test_names_of_ours_do_not_look_into_the_catalogue(capsys, monkeypatch):
    monkeypatch.setattr(catalogue.tfds, "list_builders", None)
    assert fedhelp("data describe fed_isic2019") == 0
