import logging
import zipfile

import numpy as np
import pytest
from isic_files import IsicFiles, mask_of, png

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.readers import fed_isic2019, images
from fedhelp_jax.data.readers.fed_isic2019 import load_fed_isic2019
from fedhelp_jax.data.types import check_federated


@pytest.fixture
def fixture(tmp_path):
    return IsicFiles(tmp_path)


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
        (None, "mask masks/ISIC_007.png or masks/ISIC_007_segmentation.png of an image of .* is "),
        (None, "is not in .*images.zip \\(1 of 42 are missing\\)"),
        (b"text", "mask masks/ISIC_007_segmentation.png in .*images.zip cannot be decoded"),
        (png(mask_of("x", (9, 9))), "masks/ISIC_007_segmentation.png in .* is 9x9, but .* is 14x9"),
        (png(3 * mask_of("x")), "mask masks/ISIC_007_segmentation.png holds 3; a mask of one"),
    ],
)
def test_a_bad_mask_is_named_before_images_are_decoded(fixture, monkeypatch, content, message):
    def load_images(*_, **__):
        raise AssertionError("images were decoded")

    monkeypatch.setattr(fed_isic2019, "load_images", load_images)
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


def test_real_masks(real, image_cache):
    data = load_fed_isic2019(
        str(real / "ham10000_200x150.zip"),
        str(real / "fed_isic2019_ham_split.csv"),
        split="grouped",
        image_size=32,
        validation_fraction=0.1,
        max_train=None,
        seed=0,
        cache_dir=image_cache,
        masks=True,
    )
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
