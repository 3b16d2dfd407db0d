"""Whole runs on data as it comes: what is wrong is one line and exit code 2, what is odd works."""

import csv
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import fedhelp, read, refusal, train
from helpers import use_tiny_networks
from isic_files import COLUMNS, FLAGS, jpeg

from fedhelp_jax.core import memory
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.sources import load_public
from fedhelp_jax.experiments import runner
from fedhelp_jax.settings.schema import PublicConfig
from fedhelp_jax.teachers.answers import Answers, save_answers
from fedhelp_jax.teachers.backends.simulated import simulated


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    use_tiny_networks(monkeypatch)


@pytest.fixture(autouse=True)
def no_cache_of_images(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDHELP_CACHE_DIR", str(tmp_path / "cache"))


def refused(tmp_path: Path, capsys, rest: str) -> str:
    message = refusal(capsys, train(tmp_path / "run", rest))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    return message


# --- settings that do not fit the data ---


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("--config.algorithm.k=8", ["algorithm.k", "8", "less than the 8 classes"]),
        ("--config.algorithm.k=9", ["algorithm.k", "9", "less than the 8 classes"]),
        ("--config.roles.top_n=5", ["roles.top_n", "5", "4 clients"]),
        ("""--config.roles.large='("clinic_9",)'""", ["roles.large", "clinic_9", "client_0"]),
        (
            "--config.data.num_examples=3",
            ["data.fractions", "3 examples are too few for 4 clients"],
        ),
        ("--config.teacher.name=stored --config.teacher.path=/no/a.npz", ["teacher.path", "/no/a"]),
        ("--config.public.name=npz --config.public.path=/no/p.npz", ["public.path", "/no/p.npz"]),
        ("--config.data.name=medmnist --config.data.path=/no/m.npz", ["data.path", "/no/m.npz"]),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, capsys, rest, words):
    message = refused(tmp_path, capsys, rest)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("--config.data.num_examples=2000000000", ["data.num_examples or data.image_size"]),
        (
            "--config.data.image_size=1000000",
            ["uint8 [100, 1000000, 1000000, 3]", "300,000,000,000,000 bytes (279,396.77 GiB)"],
        ),
        ("--config.public.num_examples=2000000000", ["public.num_examples", "public images"]),
        ("--config.batch_size=2000000000", ["config.batch_size is too large", "GiB of memory"]),
        ("--config.public_batch_size=2000000000", ["config.public_batch_size is too large"]),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_allocated(tmp_path, capsys, rest, words):
    message = refused(tmp_path, capsys, rest)
    for word in (*words, "would take"):
        assert word in message


def test_images_that_would_not_fit_once_resized_are_refused(tmp_path, capsys, monkeypatch):
    path = tmp_path / "public.npz"
    np.savez(path, images=np.zeros((12, 9, 9, 3), np.uint8), labels=np.arange(12) % 3)
    monkeypatch.setattr(memory, "host_bytes", lambda: 2000)
    with pytest.raises(
        UserError, match=r"data.image_size .* \[12, 8, 8, 3\], would take 2,304 bytes"
    ):
        load_public(PublicConfig(name="npz", path=str(path)), image_size=8, seed=0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 7.28 TiB"), "out of memory (Unable to allocate 7.28 TiB)"),
        (MemoryError(), "out of memory (no size is told); smaller batches"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nat 3"), "9 bytes);"),
    ],
)
def test_a_failed_allocation_is_one_line(tmp_path, capsys, monkeypatch, error, words):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(runner, "train", fails)
    assert words in refused(tmp_path, capsys, "")


# --- public answers ---


@pytest.fixture
def answers():
    """What the tiny run's public images are, and answers to all of them."""
    public = load_public(PublicConfig(num_examples=12), image_size=8, seed=0)
    return simulated(public, 0.9)._replace(fingerprint="a model of mine")


def with_nan(answers: Answers) -> Answers:
    logits = answers.logits.copy()
    logits[4, 2] = np.nan
    return answers._replace(logits=logits)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda a: a._replace(logits=a.logits[1:], sha256=a.sha256[1:]),
            ["1 of the 12 images", "sha256"],
        ),
        (lambda a: a._replace(logits=a.logits.astype(np.int64)), ["must be floats", "int64"]),
        (lambda a: a._replace(logits=a.logits.astype(object)), ["no readable .npz"]),
        (with_nan, ["finite", "row 4"]),
    ],
    ids=["missing-hash", "integers", "objects", "nan"],
)
def test_bad_answers_are_told_by_their_file(tmp_path, capsys, answers, spoil, words):
    path = tmp_path / "answers.npz"
    save_answers(path, spoil(answers))
    rest = f"--config.teacher.name=stored --config.teacher.path={path}"
    message = refused(tmp_path, capsys, rest)
    for word in ("teacher.path", *words):
        assert word in message


def test_public_images_without_labels_need_a_teacher(tmp_path, capsys):
    path = tmp_path / "public.npz"
    np.savez(path, images=np.zeros((12, 8, 8, 3), np.uint8))
    rest = f"--config.public.name=npz --config.public.path={path}"
    message = refused(tmp_path, capsys, f"{rest} --config.teacher.name=none")
    assert "teacher" in message and "no labels" in message
    message = refused(tmp_path, capsys, f"{rest} --config.teacher.name=simulated")
    assert "teacher" in message and "labels" in message


# --- real images ---


class Hospitals:
    """A zip of JPEGs and its split: one centre large, one with one training image, one odd.

    Centre 2 has no image of class 1 to train on and none of class 0 to test on.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.zip, self.table = folder / "images.zip", folder / "split.csv"
        self.rows = [self.row(i, i % 4, 0, "test" if i >= 20 else "train") for i in range(26)]
        self.rows += [self.row(30, 3, 1, "train"), self.row(31, 2, 1, "test")]
        self.rows += [self.row(40 + i, 2 * (i % 2), 2, "train") for i in range(6)]
        self.rows += [self.row(50 + i, 1 + i % 2, 2, "test") for i in range(3)]
        self.images = {row[0]: jpeg(seed) for seed, row in enumerate(self.rows)}

    @staticmethod
    def row(number: int, target: int, center: int, fold: str) -> list:
        return [f"ISIC_{number:03}", target, center, fold, f"HAM_{number}"]

    def settings(self) -> str:
        with zipfile.ZipFile(self.zip, "w") as file:
            for name, content in self.images.items():
                file.writestr(f"images/{name}.jpg", content)
        with self.table.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])
        return (
            f"{FLAGS} --config.data.path={self.zip} "
            f"--config.data.table={self.table} --config.data.cache_dir={self.folder / 'cache'} "
            "--config.data.label_names=A,B,C,D,E,F,G,H"
        )


@pytest.fixture
def hospitals(tmp_path):
    return Hospitals(tmp_path)


def test_a_missing_data_folder_is_named(tmp_path, capsys, hospitals):
    settings = hospitals.settings().replace(str(hospitals.zip), "/no/images")
    assert "data.path: /no/images does not exist" in refused(tmp_path, capsys, settings)


def test_a_missing_split_file_is_named(tmp_path, capsys, hospitals):
    settings = hospitals.settings()
    hospitals.table.unlink()
    message = refused(tmp_path, capsys, settings)
    assert "data.table" in message and str(hospitals.table) in message


def test_an_image_missing_in_the_zip_is_named(tmp_path, capsys, hospitals):
    del hospitals.images["ISIC_007"]
    message = refused(tmp_path, capsys, hospitals.settings())
    for word in ("data.path", "ISIC_007", str(hospitals.table), str(hospitals.zip), "1 of 37"):
        assert word in message


def test_an_unknown_image_in_the_split_is_named(tmp_path, capsys, hospitals):
    hospitals.rows.insert(3, hospitals.row(99, 0, 0, "train"))
    message = refused(tmp_path, capsys, hospitals.settings())
    assert "ISIC_099" in message and str(hospitals.table) in message


def test_a_corrupt_image_is_named(tmp_path, capsys, hospitals):
    hospitals.images["ISIC_007"] = hospitals.images["ISIC_007"][:400]
    message = refused(tmp_path, capsys, hospitals.settings())
    for word in ("data.path", "ISIC_007.jpg", str(hospitals.zip), "cannot be decoded"):
        assert word in message


def test_a_label_out_of_range_is_named(tmp_path, capsys, hospitals):
    hospitals.rows[5][1] = 8
    message = refused(tmp_path, capsys, hospitals.settings())
    for word in ("data.path", str(hospitals.zip), "ISIC_005", "0..7", "8"):
        assert word in message


@pytest.mark.parametrize(("fold", "lacks"), [("train", "test"), ("test", "train")])
def test_an_empty_client_is_named(tmp_path, capsys, hospitals, fold, lacks):
    for row in hospitals.rows:
        if row[2] == 1:
            row[3] = fold
    message = refused(tmp_path, capsys, hospitals.settings())
    for word in ("data.path", str(hospitals.zip), "center_1", f"no {lacks} example"):
        assert word in message


def test_labels_of_an_npz_out_of_range_are_named(tmp_path, capsys):
    arrays = {
        f"{part}_{what}": values
        for part, count in (("train", 40), ("val", 8), ("test", 16))
        for what, values in (
            ("images", np.zeros((count, 8, 8), np.uint8)),
            ("labels", np.arange(count)[:, None] % 3),  # there are two classes
        )
    }
    path = tmp_path / "pneumoniamnist.npz"
    np.savez(path, allow_pickle=False, **arrays)
    rest = f"--config.data.name=medmnist --config.data.path={path}"
    message = refused(tmp_path, capsys, rest)
    for word in ("data.path", str(path), "label 2"):
        assert word in message


@pytest.mark.slow
def test_what_real_hospitals_bring_works(tmp_path, capsys, hospitals):
    """One training image, batches larger than clients, classes absent from train or test."""
    rest = f"{hospitals.settings()} --config.rounds=2 --config.evaluate_every=2"
    rest += " --config.teacher.name=none"
    workdir = tmp_path / "run"
    assert train(workdir, rest) == 0
    summary = read(workdir / "summary.json")
    assert summary["dataset"] == "images" and summary["synthetic"] is False
    assert summary["teacher"] is None and summary["teacher_queries"] == 0
    clients = {c["name"]: c for c in summary["per_client"]}
    assert {n: (c["role"], c["n_train"], c["n_test"]) for n, c in clients.items()} == {
        "center_0": ("large", 18, 6),
        "center_1": ("small", 1, 1),
        "center_2": ("small", 6, 3),
    }
    for client in clients.values():
        assert 0 <= client["metrics"]["balanced_accuracy"] <= 1
        assert client["metrics"]["loss"] > 0
    assert clients["center_1"]["metrics"]["auroc"] is None
    assert clients["center_2"]["metrics"]["auroc"] is not None
    first, second = read(workdir / "metrics.jsonl")
    assert first["loss"] > 0 and "small_mean" not in first
    # Nobody small has images to validate on.
    assert second["small_mean"] is None and second["large_mean"] is not None
    text = (workdir / "summary.json").read_text() + (workdir / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert "center_1" in capsys.readouterr().out
    assert fedhelp(f"show {workdir}") == 0


@pytest.mark.slow
def test_stored_answers_work(tmp_path, answers):
    """In another order than the images, and over more images than the run uses."""
    order = np.random.default_rng(0).permutation(12)
    path = tmp_path / "answers.npz"
    save_answers(
        path,
        answers._replace(
            logits=np.concatenate([answers.logits[order], np.zeros_like(answers.logits[:1])]),
            sha256=(*(answers.sha256[i] for i in order), "0" * 64),
        ),
    )
    rest = f"--config.rounds=1 --config.teacher.name=stored --config.teacher.path={path}"
    assert train(tmp_path / "run", rest) == 0
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["teacher"] == "a model of mine"
    assert summary["teacher_queries"] == 12
    assert json.dumps(summary["program"]["devices"]) == str(jax.device_count())


def test_answers_that_are_masks_do_not_teach_whole_images(tmp_path, capsys, answers):
    path = tmp_path / "answers.npz"
    save_answers(path, answers._replace(logits=np.stack([answers.logits] * 4, axis=1)))
    rest = f"--config.teacher.name=stored --config.teacher.path={path}"
    line = refusal(capsys, train(tmp_path / "run", rest))
    assert "of shape [4, " in line and "'classification' needs one row of logits" in line
