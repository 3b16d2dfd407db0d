"""MedMNIST fetched by itself, from a server on this machine that stands for Zenodo."""

import hashlib
import http.server
import threading

import numpy as np
import pytest
from commands import fedhelp, refusal

from fedhelp_jax.data.builders import fetch, medmnist
from fedhelp_jax.data.builders.prepare import builder, describe, prepare

NAME, FILE = "medmnist/breastmnist_28", "breastmnist.npz"


class Zenodo(http.server.ThreadingHTTPServer):
    """Hands out one file; ``answers`` says how, one after the other, and the last for ever."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.answers, self.asked = b"", ["whole"], []
        self.url = f"http://127.0.0.1:{self.server_port}/records/1/files"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802  http.server calls it so
        server = self.server
        assert isinstance(server, Zenodo)
        how = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        wanted = self.headers.get("Range")
        server.asked.append((self.path, wanted))
        data = server.data
        if how in ("404", "302"):
            self.send_response(int(how))
            self.send_header("Location", "ftp://127.0.0.1/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if how == "no ranges":
            start = 0
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if how != "no length":
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if how == "whole and more":
            data += b"more"
        self.wfile.write(data[start : len(data) // 2] if how == "half" else data[start:])

    def log_message(self, format, *args): ...


@pytest.fixture
def zenodo(monkeypatch):
    with Zenodo() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(medmnist, "_URL", server.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def published(zenodo, tmp_path, monkeypatch):
    """A small set whose checksum is the official one."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in {"train": 5, "val": 3, "test": 4}.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (count, 1), dtype=np.uint8)
    np.savez(tmp_path / FILE, **arrays)
    zenodo.data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).unlink()
    md5 = hashlib.md5(zenodo.data).hexdigest()
    monkeypatch.setitem(medmnist.SUBSETS["breastmnist"]["md5"], "28", md5)
    return arrays


@pytest.fixture
def command(tmp_path):
    return f"data prepare {NAME} --data_dir={tmp_path}"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "downloads" / "medmnist"


def check(tmp_path, arrays):
    """That the prepared set is what the server has, and that the file is kept."""
    source = builder(NAME, str(tmp_path)).as_data_source(split="test")
    found = {example["id"].decode(): example for example in source}
    for i, image in enumerate(arrays["test_images"]):
        np.testing.assert_array_equal(found[f"test_{i:06}"]["image"][..., 0], image)
    assert [path.name for path in (tmp_path / "downloads" / "medmnist").iterdir()] == [FILE]


def test_a_set_is_fetched_and_prepared(zenodo, published, tmp_path, folder):
    said: list[str] = []
    prepare(NAME, None, str(tmp_path), said.append)
    check(tmp_path, published)
    assert zenodo.asked == [(f"/records/1/files/{FILE}?download=1", None)]
    assert said[:2] == [
        f"fetching {zenodo.url}/{FILE}?download=1 to {folder}",
        f"{len(zenodo.data) / 1e6:.1f} MB",
    ]


def test_what_is_there_is_not_fetched_again(zenodo, published, tmp_path, folder):
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(zenodo.data)
    prepare(NAME, None, str(tmp_path), lambda text: None)
    check(tmp_path, published)
    assert not zenodo.asked


def test_what_is_there_but_another_file_is_fetched_anew(zenodo, published, tmp_path, folder):
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(b"damaged")
    prepare(NAME, None, str(tmp_path), lambda text: None)
    check(tmp_path, published)


@pytest.mark.parametrize("then", ["whole", "no ranges"])
def test_an_interrupted_download_goes_on_or_begins_anew(
    zenodo, published, tmp_path, folder, command, capsys, then
):
    zenodo.answers = ["half", then]
    size, half = len(zenodo.data), len(zenodo.data) // 2
    line = refusal(capsys, fedhelp(command))
    assert f"it ended after {half} of {size} bytes" in line and "--manual_dir" in line
    assert [path.name for path in folder.iterdir()] == [f"{FILE}.part"]
    assert fedhelp(command) == 0
    assert zenodo.asked[1][1] == f"bytes={half}-"
    check(tmp_path, published)


def test_a_download_stopped_between_its_last_byte_and_its_name(
    zenodo, published, tmp_path, folder, command
):
    folder.mkdir(parents=True)
    (folder / f"{FILE}.part").write_bytes(zenodo.data)
    assert fedhelp(command) == 0
    check(tmp_path, published)


def test_an_earlier_part_of_another_file_is_thrown_away(
    zenodo, published, tmp_path, folder, command, capsys
):
    folder.mkdir(parents=True)
    (folder / f"{FILE}.part").write_bytes(b"another")
    assert "is not the official file: its md5 is " in refusal(capsys, fedhelp(command))
    assert not list(folder.iterdir())
    assert fedhelp(command) == 0
    check(tmp_path, published)


def test_more_than_was_announced_is_not_read(zenodo, published, tmp_path, command):
    zenodo.answers = ["whole and more"]
    assert fedhelp(command) == 0
    check(tmp_path, published)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("404", "cannot be fetched: 404 Not Found; try again, or download it elsewhere"),
        ("302", "cannot be fetched: it redirects to ftp://127.0.0.1/"),
        ("no length", "its server does not say how large it is"),
    ],
)
def test_other_answers_are_one_line(zenodo, published, folder, command, capsys, how, words):
    zenodo.answers = [how]
    line = refusal(capsys, fedhelp(command))
    assert words in line and f"{zenodo.url}/{FILE}?download=1" in line and "--manual_dir" in line
    assert not list(folder.iterdir())


def test_another_file_than_the_official_one_is_refused(zenodo, published, folder, command, capsys):
    zenodo.data = zenodo.data[:-1] + b"?"
    line = refusal(capsys, fedhelp(command))
    assert "is not the official file: its md5 is " in line and "--manual_dir" in line
    assert not list(folder.iterdir())


def test_no_network_is_one_line(zenodo, folder, command, capsys, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    monkeypatch.setattr(medmnist, "_URL", url)
    line = refusal(capsys, fedhelp(command))
    assert f"{url}/{FILE}?download=1 cannot be fetched: " in line and "refused" in line
    assert "name its folder with --manual_dir" in line


def test_a_server_that_falls_silent_is_one_line(zenodo, command, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "_TIMEOUT", 0.2)
    monkeypatch.setattr(Handler, "do_GET", lambda self: threading.Event().wait(1))
    assert "timed out" in refusal(capsys, fedhelp(command))


def test_a_full_disk_is_one_line(zenodo, published, folder, command, capsys, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "md5_of", full)
    assert "No space left on device" in refusal(capsys, fedhelp(command))


def test_it_is_fetched_from_zenodo_by_https():
    url = builder("medmnist/chestmnist_224").remote().url
    assert url == "https://zenodo.org/records/10519652/files/chestmnist_224.npz?download=1"
    assert "Fetched by itself" in describe("medmnist/chestmnist_224") and url in describe(
        "medmnist/chestmnist_224"
    )
