"""Folders whose table tells sites, lesions and an official split: the raw files of Fed-ISIC2019."""

import logging
import zipfile

import numpy as np
import pytest
from isic_files import IsicFiles, isic_config, jpeg, mask_of, png

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.readers import folder as reader
from fedhelp_jax.data.readers import images
from fedhelp_jax.data.sources import load_federated
from fedhelp_jax.data.types import check_federated


@pytest.fixture
def fixture(tmp_path):
    return IsicFiles(tmp_path)


def test_grouped_drops_lesions_of_the_test_fold(fixture):
    data = check_federated(fixture.load())
    big, small = data.clients
    assert (big.name, small.name) == ("center_1", "center_4")
    # Of 28 training images four go: the partners of 0 and 2, and lesion 2 twice.
    assert sum(len(part) for client in data.clients for part in client[1:]) == 42 - 4
    assert (len(big.train), len(big.validation), len(big.test)) == (22, 2, 12)
    assert (len(small.train), len(small.validation), len(small.test)) == (1, 0, 1)
    rows = sorted(fixture.rows)
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
    assert "official split has 3 groups (patients or lesions) with images in both" in record.message
    assert len(data.labels) == 42
    train = [*data.clients[0].train, *data.clients[0].validation]
    lesion = {row[0]: row[4] for row in fixture.rows}
    sides = [
        {lesion[fixture.ids()[i]] for i in part}
        for part in (data.clients[0].train, data.clients[0].validation)
    ]
    assert len(train) == 28 and not sides[0] & sides[1]


def test_a_center_does_not_depend_on_the_others(fixture):
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
    assert [client.name for client in data.clients] == ["center_1"]
    assert "images.zip has no image of sites 4: left out" in caplog.text


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


def test_missing_images_are_counted(fixture):
    fixture.write_zip(row[0] for row in fixture.rows if row[0] not in ("ISIC_005", "ISIC_017"))
    with pytest.raises(UserError) as caught:
        fixture.load()
    assert str(caught.value) == (
        f"data.path: image ISIC_005 of {fixture.table} is not in {fixture.zip} "
        "(2 of 42 are missing)"
    )
    fixture.write_zip(["other"])
    with pytest.raises(UserError, match=r"ISIC_000 of .* is not in .* \(42 of 42 are missing\)"):
        fixture.load()


def test_corrupt_image(fixture):
    with zipfile.ZipFile(fixture.zip, "w") as file:
        for row in fixture.rows:
            file.writestr(f"{row[0]}.jpg", jpeg(0) if row[0] != "ISIC_007" else jpeg(0)[:400])
    with pytest.raises(UserError, match="image ISIC_007.jpg in .*images.zip cannot be decoded"):
        fixture.load()


@pytest.mark.parametrize(("fold", "lacks"), [("train", "test"), ("test", "train")])
def test_empty_client_is_named(fixture, fold, lacks):
    fixture.rows[40][3] = fixture.rows[41][3] = fold
    with pytest.raises(UserError, match=f"leaves client center_4 no {lacks} example"):
        fixture.load()


# --- masks instead of diagnoses ---


@pytest.mark.parametrize("split", ["grouped", "official"])
def test_masks_take_the_place_of_diagnoses(fixture, split):
    fixture.add_masks()
    data = check_federated(fixture.load(split=split, masks=True))
    plain = fixture.load(split=split)
    assert data.label_names == ("lesion",) and data.labels.dtype == np.uint8
    assert np.array_equal(data.labels, np.stack([mask_of(name) for name in fixture.ids()]))
    assert np.array_equal(data.images, plain.images)
    for one, two in zip(data.clients, plain.clients, strict=True):
        assert one.name == two.name and all(map(np.array_equal, one[1:], two[1:]))


def test_masks_come_from_a_folder_too(fixture, tmp_path):
    fixture.add_masks()
    with zipfile.ZipFile(fixture.zip) as file:
        file.extractall(tmp_path / "folder")
    one, two = fixture.load(masks=True), fixture.load(masks=True, path=str(tmp_path / "folder"))
    assert np.array_equal(one.labels, two.labels) and np.array_equal(one.images, two.images)


def test_masks_are_kept_in_the_cache(fixture, monkeypatch):
    fixture.add_masks()
    first = fixture.load(masks=True)

    def decode(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(images, "_decode_all", decode)
    again = fixture.load(masks=True)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.images, again.images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mask masks/ISIC_007.png or masks/ISIC_007_segmentation.png of an image is "),
        (None, "is not in .*images.zip \\(1 of 42 are missing\\)"),
        (b"text", "mask masks/ISIC_007_segmentation.png in .*images.zip cannot be decoded"),
        (png(mask_of("x", (9, 9))), "masks/ISIC_007_segmentation.png in .* is 9x9, but .* is 14x9"),
        (png(3 * mask_of("x")), "mask masks/ISIC_007_segmentation.png holds 3; a mask of one"),
    ],
)
def test_a_bad_mask_is_named_before_images_are_decoded(fixture, monkeypatch, content, message):
    def load_images(*_, **__):
        raise AssertionError("images were decoded")

    monkeypatch.setattr(reader, "load_images", load_images)
    fixture.add_masks(ISIC_007=content)
    with pytest.raises(UserError, match=f"^data.path: .*{message}"):
        fixture.load(masks=True)


def test_empty_masks(fixture, caplog):
    nothing = png(0 * mask_of("x"))
    fixture.add_masks(ISIC_007=nothing, ISIC_009=nothing)
    with caplog.at_level(logging.WARNING):
        fixture.load(masks=True)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"data.path: {fixture.zip}: 2 of 42 masks are empty, "
        f"the first is masks/ISIC_007_segmentation.png"
    )
    fixture.write_zip(row[0] for row in fixture.rows)
    fixture.add_masks(**{row[0]: nothing for row in fixture.rows})
    with pytest.raises(UserError, match="images.zip: all 42 masks are empty"):
        fixture.load(masks=True)


def test_real_masks(real):
    config = isic_config(
        real / "ham10000_200x150.zip",
        real / "fed_isic2019_ham_split.csv",
        masks=True,
        image_size=32,
    )
    data = load_federated(config, 0, masks=True)
    assert check_federated(data).labels.shape == (10015, 150, 200)
    assert data.label_names == ("lesion",)
    share = data.labels.mean(axis=(1, 2), dtype=np.float32)
    assert share.min() > 0.003 and 0.2 < np.median(share) < 0.3
    # Lesions are darker than the skin, unless a mask is inside out or belongs to another image.
    grey = data.images.mean(axis=-1)
    rows, columns = ((np.arange(32) + 0.5) * np.array([[150], [200]]) / 32).astype(int)
    masks = data.labels[:, rows[:, None], columns] == 1
    darker = [i[m].mean() < i.mean() for i, m in zip(grey, masks, strict=True) if m.any()]
    assert len(darker) > 10000 and np.mean(darker) > 0.95
