"""Private data from a folder or zip of images: with a table, or by the folders they lie in."""

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import CONFIG, fedhelp, read
from commands import refusal as refused_command
from helpers import refusal
from PIL import Image

from fedhelp_jax.data.sources import load_federated
from fedhelp_jax.settings.schema import ColumnsConfig, DataConfig

COUNT = 48
NAMED = {"image": "file", "label": "finding", "site": "hospital", "group": "patient"}


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number)).save(path)


def write_hospital(folder: Path, **changes: dict[int, str]) -> Path:
    """Images in ``photos/`` and ``table.csv``; `changes` give other values by column and row."""
    rows = []
    for i in range(COUNT):
        row = {
            "file": f"photos/{i:02}.png",
            "finding": ("naevus", "melanoma", "keratosis")[i % 3],
            "hospital": ("north", "south")[i % 4 == 3],
            "patient": f"p{i // 2}",
            "age": str(30 + i),
        }
        save(folder / row["file"], i)
        rows.append(row | {name: given[i] for name, given in changes.items() if i in given})
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return folder


def load(folder: Path, named: dict[str, str] | None = None, **settings):
    settings = {"image_size": 12, "cache_dir": str(folder.parent / "cache")} | settings
    columns = ColumnsConfig(**(NAMED if named is None else named))
    config = DataConfig(name="folder", path=str(folder), columns=columns, **settings)
    return load_federated(config, 0)


def test_images_classes_and_clients(tmp_path):
    data = load(write_hospital(tmp_path / "x"))
    assert (data.name, data.synthetic) == ("x", False)
    assert data.label_names == ("keratosis", "melanoma", "naevus")
    assert [client.name for client in data.clients] == ["north", "south"]
    for i in range(COUNT):  # in the order of the files
        np.testing.assert_array_equal(data.images[i], picture(i))
        assert data.label_names[data.labels[i]] == ("naevus", "melanoma", "keratosis")[i % 3]
    for client in data.clients:
        members = np.concatenate(client[1:])
        assert {int(i) % 4 == 3 for i in members} == {client.name == "south"}


def test_no_patient_is_on_two_sides_of_the_split(tmp_path):
    data = load(write_hospital(tmp_path / "x"))
    for client in data.clients:
        patients = [{int(i) // 2 for i in members} for members in client[1:]]
        assert not patients[0] & patients[1] and not (patients[0] | patients[1]) & patients[2]
    assert ("groups", "24, none of them both in train and in test") in data.facts


def test_a_zip_and_an_order_of_lines_of_its_own_give_the_same(tmp_path):
    folder = write_hospital(tmp_path / "x")
    one = load(folder)
    lines = (folder / "table.csv").read_text().splitlines()
    (folder / "table.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    two = load(tmp_path / "x.zip")
    np.testing.assert_array_equal(one.images, two.images)
    for a, b in zip(one.clients, two.clients, strict=True):
        assert all(map(np.array_equal, a, b))


def test_sides_of_a_table(tmp_path):
    sides = {i: ("train", "Val", "testing")[i % 3] for i in range(COUNT)}
    folder = write_hospital(tmp_path / "x", age=sides)
    data = load(folder, {**NAMED, "split": "age"}, split="official")
    for client in data.clients:
        for place, members in enumerate(client[1:]):
            assert len(members) and {int(i) % 3 for i in members} == {place}


def test_any_other_column_can_make_clients(tmp_path):
    named = {"image": "file", "label": "finding"}
    folder = write_hospital(tmp_path / "x")
    data = load(folder, named, split_by="column:hospital")
    assert [client.name for client in data.clients] == ["north", "south"]
    data = load(folder, named, split_by="iid", num_clients=3)
    assert [client.name for client in data.clients] == ["client_0", "client_1", "client_2"]


@pytest.mark.parametrize(
    ("layout", "clients", "classes"),
    [
        ("{finding}/{i}.jpg", 6, ("a", "b")),
        ("{site}/{finding}/{i}.jpg", 2, ("a", "b")),
        ("{side}/{site}/{finding}/{i}.jpg", 2, ("a", "b")),
    ],
)
def test_folders_say_what_a_table_would(tmp_path, layout, clients, classes):
    for i in range(COUNT):
        side = ("train", "test")[i % 4 == 0]
        finding, site = "ab"[i % 2], f"s{i // 24}"
        save(tmp_path / "x" / layout.format(i=i, side=side, site=site, finding=finding), i)
    data = load(tmp_path / "x", {}, split="official")
    assert (len(data.clients), data.label_names) == (clients, classes)
    if "side" in layout:
        assert sum(len(client.test) for client in data.clients) == COUNT // 4


def test_numbers_are_the_classes_themselves(tmp_path):
    folder = write_hospital(tmp_path / "x", finding={i: str(2 * (i % 2)) for i in range(COUNT)})
    assert load(folder).label_names == ("0", "1", "2")
    data = load(folder, label_names=("none", "some", "much", "all"))
    assert data.label_names == ("none", "some", "much", "all")
    assert set(data.labels.tolist()) == {0, 2}
    assert "label 2 of photos/01 is not in 0..1" in refusal(
        lambda: load(folder, label_names=("no", "yes"))
    )


def test_parquet_is_as_csv(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    folder = write_hospital(tmp_path / "x")
    one = load(folder)
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    two = load(folder, table=str(tmp_path / "table.parquet"))
    np.testing.assert_array_equal(one.labels, two.labels)


def drop_image(folder: Path) -> None:
    (folder / "photos/05.png").unlink()


def two_tables(folder: Path) -> None:
    (folder / "more.csv").write_text("file\na\n")


def names_second(folder: Path) -> None:
    """The first column of the table is not the one that holds the files."""
    lines = (folder / "table.csv").read_text().splitlines()
    numbered = [f"number,{lines[0]}", *(f"{i},{line}" for i, line in enumerate(lines[1:]))]
    (folder / "table.csv").write_text("\n".join(numbered) + "\n")


def twice(folder: Path) -> None:
    with (folder / "table.csv").open("a") as file:
        file.write("photos/00.png,naevus,north,p0,30\n")


@pytest.mark.parametrize(
    ("break_it", "changes", "named", "words"),
    [
        (drop_image, {}, None, ["data.path", "photos/05", "1 of 48 are missing"]),
        (two_tables, {}, None, ["data.table is not set", "more.csv, table.csv"]),
        (twice, {}, None, ["data.table", "lists image photos/00 more than once"]),
        (None, {}, {"image": "files"}, ["no column files", "did you mean file?"]),
        (None, {}, {"label": "finding"}, ["no column image", "--config.data.columns.image=file"]),
        (names_second, {}, {}, ["no column image", "--config.data.columns.image=file"]),
        (None, {"finding": {3: ""}}, None, ["1 of 48 images have no label, such as photos/03"]),
        (None, {"file": {3: "../a.png"}}, None, ["'../a.png' is not the name of a file inside"]),
        (None, {"hospital": {3: "?"}}, None, ["of unknown site, such as photos/03"]),
        (None, {"age": {0: "trian"}}, {**NAMED, "split": "age"}, ["row 2", "'trian'"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, break_it, changes, named, words):
    folder = write_hospital(tmp_path / "x", **changes)
    if break_it is not None:
        break_it(folder)
    message = refusal(lambda: load(folder, named))
    for word in words:
        assert word in message, message


def test_data_check_tells_what_a_run_would_read(tmp_path, capsys):
    folder = write_hospital(tmp_path / "x")
    (folder / "photos/07.png").write_bytes(b"no picture")
    columns = " ".join(f"--config.data.columns.{k}={v}" for k, v in NAMED.items())
    command = (
        f"data check --config={CONFIG} --config.data.name=folder --config.data.path={folder} "
        f"{columns} --config.data.cache_dir={tmp_path / 'cache'} --config.algorithm.name=local "
        f"--workdir={tmp_path / 'sheets'}"
    )
    assert fedhelp(command) == 2
    printed = capsys.readouterr().out
    for words in ("all 12x12", "3 (keratosis, melanoma, naevus)", "unusable: 1", "photos/07.png"):
        assert words in printed
    assert {file.name for file in (tmp_path / "sheets").iterdir()} == {"north.png", "south.png"}
    assert fedhelp(f"{command} --config.data.on_bad_example=skip") == 0
    capsys.readouterr()
    assert "photos/07.png" in refused_command(
        capsys, fedhelp(f"train {command.removeprefix('data check ')}".replace("sheets", "run"))
    )


@pytest.mark.slow
def test_a_run_on_it_says_its_name(tmp_path):
    folder = write_hospital(tmp_path / "x")
    columns = " ".join(f"--config.data.columns.{k}={v}" for k, v in NAMED.items())
    command = (
        f"train --config={CONFIG} --workdir={tmp_path / 'run'} --config.data.name=folder "
        f"--config.data.path={folder} {columns} --config.data.cache_dir={tmp_path / 'cache'} "
        "--config.algorithm.name=local --config.roles.top_n=1 --config.rounds=1 "
        "--config.model.small=cnn_small --config.model.large=cnn_small "
        "--config.data.image_size=12"
    )
    assert fedhelp(command) == 0
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["dataset"] == "x" and summary["synthetic"] is False
