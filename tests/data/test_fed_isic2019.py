import logging
import zipfile

import numpy as np
import pytest
from isic_files import COLUMNS, IsicFiles, jpeg

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import check_federated


@pytest.fixture
def fixture(tmp_path):
    return IsicFiles(tmp_path)


def test_grouped_drops_lesions_of_the_test_fold(fixture):
    data = check_federated(fixture.load())
    big, small = data.clients
    assert (big.name, small.name) == ("centre_1", "centre_4")
    # Of 28 training images four go: the partners of 0 and 2, and lesion 2 twice.
    assert sum(len(part) for client in data.clients for part in client[1:]) == 42 - 4
    assert (len(big.train), len(big.validation), len(big.test)) == (22, 2, 12)
    assert (len(small.train), len(small.validation), len(small.test)) == (1, 0, 1)
    rows = sorted(fixture.rows, key=lambda r: (r[2], r[0]))
    # All stay in the pool: dropped images are private too.
    assert [row[1] for row in rows] == data.labels.tolist()
    used = {i for client in data.clients for part in client[1:] for i in part.tolist()}
    tested = {row[4] for row in rows if row[3] == "test" and row[4]}
    assert used == {i for i, r in enumerate(rows) if r[3] == "test" or r[4] not in tested}
    sides = [{rows[i][4] for i in part} for part in big[1:]]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_official_keeps_all_and_says_so(fixture, caplog):
    with caplog.at_level(logging.WARNING):
        data = check_federated(fixture.load(split="official"))
    (record,) = caplog.records
    assert record.getMessage() == (
        "data.split=official: 3 lesions have images in both train and test"
    )
    assert len(data.labels) == 42
    train = [*data.clients[0].train, *data.clients[0].validation]
    lesion = {row[0]: row[4] for row in fixture.rows}
    sides = [
        {lesion[fixture.ids()[i]] for i in part}
        for part in (data.clients[0].train, data.clients[0].validation)
    ]
    assert len(train) == 28 and not sides[0] & sides[1]


def test_order_of_lines_does_not_matter(fixture):
    one = fixture.load()
    fixture.rows.reverse()
    two = fixture.load()
    assert np.array_equal(one.images, two.images) and np.array_equal(one.labels, two.labels)
    for first, second in zip(one.clients, two.clients, strict=True):
        assert first.name == second.name
        assert all(map(np.array_equal, first[1:], second[1:]))


def test_a_centre_does_not_depend_on_the_others(fixture):
    both = fixture.load().clients[0]
    fixture.rows = fixture.rows[:40]
    (alone,) = fixture.load().clients
    assert all(map(np.array_equal, alone[1:], both[1:]))


def test_seed_and_cap(fixture):
    def names(data):
        return data.clients[0]

    one, other, few = fixture.load(), fixture.load(seed=1), fixture.load(max_train=5)
    assert not np.array_equal(names(one).validation, names(other).validation)
    assert np.array_equal(names(one).test, names(other).test)
    assert np.array_equal(names(one).validation, names(few).validation)
    assert len(names(few).train) == 5 and set(names(few).train) <= set(names(one).train)


def test_folder_and_zip_and_cache_are_equal(fixture):
    first, second = fixture.load(), fixture.load()
    with zipfile.ZipFile(fixture.zip) as file:
        file.extractall(fixture.path / "folder")
    third = fixture.load(path=str(fixture.path / "folder"))
    fourth = fixture.load(path=str(fixture.path / "folder" / "images"))
    for data in (second, third, fourth):
        assert np.array_equal(first.images, data.images)


def test_centres_without_images_are_left_out(fixture, caplog):
    fixture.write_zip(row[0] for row in fixture.rows[:40])
    with caplog.at_level(logging.WARNING):
        data = fixture.load()
    assert [client.name for client in data.clients] == ["centre_1"]
    assert "images.zip has no image of centres [4]: left out" in caplog.text


def test_without_lesion_ids(fixture, caplog):
    with pytest.raises(UserError, match="has no column lesion_id.*use data.split=official"):
        fixture.load(columns=COLUMNS[:4])
    data = check_federated(fixture.load(columns=COLUMNS[:4], split="official"))
    assert len(data.labels) == 42
    assert "an unknown number of lesions" in caplog.text


def test_images_of_unknown_lesions_have_one_each(fixture):
    """However a table spells it; none is dropped for another's sake."""
    known = fixture.load()
    for row in fixture.rows[:10]:
        row[4] = ""
    blank = fixture.load()
    assert not np.array_equal(known.clients[0].train, blank.clients[0].train)
    for spelled in ("nan", " NA", "None"):
        for row in fixture.rows:
            row[4] = row[4] if row[4].startswith("HAM") else spelled
        data = fixture.load()
        for one, two in zip(blank.clients, data.clients, strict=True):
            assert all(map(np.array_equal, one[1:], two[1:]))


def test_blanks_after_commas(fixture):
    plain = fixture.load()
    fixture.rows = [[f" {value}" for value in row] for row in fixture.rows]
    spaced = fixture.load(columns=[f" {name}" for name in COLUMNS])
    assert np.array_equal(plain.labels, spaced.labels)
    for one, two in zip(plain.clients, spaced.clients, strict=True):
        assert all(map(np.array_equal, one[1:], two[1:]))


def test_missing_images_are_counted(fixture):
    fixture.write_zip(row[0] for row in fixture.rows if row[0] not in ("ISIC_005", "ISIC_017"))
    with pytest.raises(UserError) as caught:
        fixture.load()
    assert str(caught.value) == (
        f"data.path: image ISIC_005 of {fixture.table} is not in {fixture.zip} "
        "(2 of 42 are missing)"
    )
    fixture.write_zip(["other"])
    with pytest.raises(UserError, match="has none of the 42 images .* such as ISIC_000.jpg"):
        fixture.load()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, "", "row 5: image_id '' is not an image's name"),
        (0, "../x", "row 5: image_id '../x' is not an image's name"),
        (0, "ISIC_000", "lists image ISIC_000 2 times"),
        (1, 8, "row 5 \\(ISIC_003\\): target must be in 0..7, got '8'"),
        (1, -1, "target must be in 0..7, got '-1'"),
        (1, "", "target must be in 0..7, got ''"),
        (1, "1.0", "target must be in 0..7, got '1.0'"),
        (2, "nan", "center must be a whole number, got 'nan'"),
        (2, "Vienna", "center must be a whole number, got 'Vienna'"),
        (3, "val", "fold must be train or test, got 'val'"),
    ],
)
def test_bad_values_name_their_row(fixture, column, value, message):
    fixture.rows[3][column] = value
    with pytest.raises(UserError, match=f"^data.split_csv: .*split.csv.*{message}"):
        fixture.load()


def test_a_line_that_is_cut(fixture):
    fixture.rows[3] = fixture.rows[3][:2]
    with pytest.raises(UserError, match="row 5 .*center must be a whole number"):
        fixture.load()


@pytest.mark.parametrize("column", COLUMNS[:4])
def test_missing_column(fixture, column):
    columns = ["other" if name == column else name for name in COLUMNS]
    with pytest.raises(UserError, match=f"split.csv has no column {column}"):
        fixture.load(columns=columns)


def test_files_that_are_no_tables(fixture, tmp_path):
    other = tmp_path / "other.csv"
    for content, message in (
        (b"", "has no column image_id"),
        (b"image_id,target,center,fold\n", "has no rows"),
        (b"\xff\xfe\x00", "cannot be read as a CSV file"),
    ):
        other.write_bytes(content)
        with pytest.raises(UserError, match=message):
            fixture.load(split_csv=str(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "data.path is not set; it must name a folder or zip file of images"),
        ({"path": "/no/where"}, "data.path: /no/where does not exist"),
        ({"split_csv": None}, "data.split_csv is not set"),
        ({"split_csv": "/no/split.csv"}, "data.split_csv: /no/split.csv does not exist"),
        ({"split": "random"}, "data.split must be grouped or official, got 'random'"),
    ],
)
def test_bad_settings(fixture, changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        fixture.load(**changes)


def test_corrupt_image(fixture):
    with zipfile.ZipFile(fixture.zip, "w") as file:
        for row in fixture.rows:
            file.writestr(f"{row[0]}.jpg", jpeg(0) if row[0] != "ISIC_007" else jpeg(0)[:400])
    with pytest.raises(UserError, match="image ISIC_007.jpg in .*images.zip cannot be decoded"):
        fixture.load()


@pytest.mark.parametrize(("fold", "lacks"), [("train", "test"), ("test", "train")])
def test_empty_client_is_named(fixture, fold, lacks):
    fixture.rows[40][3] = fixture.rows[41][3] = fold
    with pytest.raises(UserError, match=f"leaves client centre_4 no {lacks} example"):
        fixture.load()
