import hashlib
import io
import logging
import os
import re
import zipfile

import numpy as np
import pytest
from helpers import refusal
from PIL import Image

from fedhelp_jax.data.bad_examples import Bad
from fedhelp_jax.data.readers import images as module
from fedhelp_jax.data.readers.folder import load_folder_public
from fedhelp_jax.data.readers.images import load_images
from fedhelp_jax.data.types import image_sha256
from fedhelp_jax.settings.schema import PublicConfig

RNG = np.random.default_rng(0)
PIXELS = {
    "b": RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8),
    "a": RNG.integers(0, 256, (9, 12), dtype=np.uint8),
    "d": RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8),
    "c.1": RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8),
}
MASKS = {name: RNG.integers(0, 2, (18, 24), dtype=np.uint8) for name in PIXELS}
IDS = sorted(PIXELS)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "skin"
    for name in ("images", "masks"):
        (path / name).mkdir(parents=True)
    for name, pixels in PIXELS.items():
        (path / "images" / f"{name}.png").write_bytes(png(pixels))
        end = "_segmentation" if name == "d" else ""
        (path / "masks" / f"{name}{end}.png").write_bytes(png(255 * MASKS[name]))
    (path / "images" / "._a.png").write_bytes(b"no image")
    (path / "images" / "notes.txt").write_bytes(b"no image")
    return path


@pytest.fixture
def load(tmp_path):
    def load(source, num_examples=None, image_size=8, masks=True):
        cache = str(tmp_path / "cache")
        config = PublicConfig(name="folder", path=str(source), num_examples=num_examples)
        return load_folder_public(config, image_size, masks=masks, cache_dir=cache, bad=Bad())

    return load


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def test_images_masks_hashes_and_originals(folder, load):
    public = load(folder)
    assert (public.name, public.synthetic) == ("skin", False)
    assert public.label_names == ("foreground",)
    assert public.images.shape == (4, 8, 8, 3) and public.images.dtype == np.uint8
    assert public.labels is not None and public.labels.dtype == np.uint8
    assert np.array_equal(public.labels, np.stack([MASKS[name] for name in IDS]))
    assert len(public.originals) == 4
    for original, sha256, name in zip(public.originals, public.sha256, IDS, strict=True):
        assert np.array_equal(original, PIXELS[name])
        shape = repr(PIXELS[name].shape).encode()
        assert sha256 == hashlib.sha256(shape + PIXELS[name].tobytes()).hexdigest()


def test_images_are_resized_as_private_ones_are(folder, load, tmp_path):
    names = [f"images/{name}.png" for name in IDS]
    private = load_images(folder, names, 8, cache_dir=str(tmp_path / "other")).images
    assert np.array_equal(load(folder).images, private)


def test_a_zip_file_is_as_its_folder(folder, load):
    one, two = load(folder), load(zipped(folder))
    assert np.array_equal(one.images, two.images) and np.array_equal(one.labels, two.labels)
    assert one.sha256 == two.sha256 and two.name == "skin"
    assert all(map(np.array_equal, one.originals, two.originals))


def test_originals_can_be_taken_as_from_a_list(folder, load):
    for source in (folder, zipped(folder)):
        originals = load(source).originals
        assert np.array_equal(originals[np.int64(1)], PIXELS["b"])
        assert np.array_equal(originals[-1], PIXELS["d"])
        assert [image.shape for image in originals[1:3]] == [(9, 12, 3), (9, 12, 3)]
        with pytest.raises(IndexError):
            originals[4]


def test_without_masks_every_image_counts(folder, load):
    (folder / "masks" / "a.png").unlink()
    public = load(folder, masks=False)
    assert len(public.images) == 4 and public.labels is None and public.label_names is None


def test_images_without_a_mask_are_left_out_and_said(folder, load, caplog):
    (folder / "masks" / "a.png").unlink()
    (folder / "masks" / "stray.png").write_bytes(b"of no image")
    with caplog.at_level(logging.WARNING):
        public = load(folder)
    (others, record) = caplog.records
    said = "1 that are no pictures by their names are not read: images/notes.txt"
    assert others.getMessage() == f"public.path: {folder}: {said}"
    assert record.getMessage() == "public.path: 1 of 4 images have no mask: left out"
    assert public.sha256 == tuple(image_sha256(PIXELS[name]) for name in IDS[1:])
    assert np.array_equal(public.labels, np.stack([MASKS[name] for name in IDS[1:]]))


def test_a_subset_grows_and_keeps_its_order(folder, load):
    whole = load(folder).sha256
    kept = [[whole.index(sha) for sha in load(folder, count).sha256] for count in (1, 2, 3, 4)]
    assert [len(places) for places in kept] == [1, 2, 3, 4]
    assert all(places == sorted(places) for places in kept)
    assert all(set(few) < set(more) for few, more in zip(kept, kept[1:], strict=False))
    some = load(folder, 2)
    assert np.array_equal(some.labels, np.stack([MASKS[IDS[place]] for place in kept[1]]))
    assert np.array_equal(some.originals[1], PIXELS[IDS[kept[1][1]]])


def test_the_cache_is_used_and_notices_changes(folder, load, monkeypatch):
    calls = []
    original = module._decode_all

    def counting(source, names, what, *rest):
        calls.append(what)
        return original(source, names, what, *rest)

    monkeypatch.setattr(module, "_decode_all", counting)
    first, again = load(folder), load(folder)
    assert calls == ["mask", "image"]
    assert np.array_equal(first.images, again.images) and first.sha256 == again.sha256
    assert np.array_equal(first.labels, again.labels)
    load(folder, image_size=5)
    assert calls == ["mask", "image", "image"], "masks do not depend on the size of images"
    turned = 1 - MASKS["a"]
    (folder / "masks" / "a.png").write_bytes(png(turned))
    os.utime(folder / "masks" / "a.png", (1, 1))
    assert np.array_equal(load(folder).labels[0], turned)
    assert calls[3:] == ["mask"]


def test_a_picture_that_is_gone_is_named_when_asked_for(folder, load):
    originals = load(folder).originals
    (folder / "images" / "b.png").unlink()
    line = refusal(lambda: originals[1])
    assert line.startswith(f"public.path: image images/b.png in {folder} cannot be read: ")
    assert np.array_equal(originals[0], PIXELS["a"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("masks/b.png", b"", "mask masks/b.png in .*skin cannot be decoded"),
        ("masks/b.png", png(MASKS["b"])[:60], "mask masks/b.png in .*skin cannot be decoded"),
        (
            "masks/b.png",
            png(MASKS["b"][1:]),
            "masks/b.png in .*skin is 24x17, but .*a.png is 24x18",
        ),
        (
            "masks/a.png",
            png(MASKS["a"][1:]),
            "masks/b.png in .*skin is 24x18, but .*a.png is 24x17",
        ),
        (
            "masks/d_segmentation.png",
            png(RNG.integers(0, 256, (18, 24), dtype=np.uint8)),
            "grey on",
        ),
        ("masks/c.1.png", png(2 * MASKS["b"]), ".*skin: mask masks/c.1.png holds 2;"),
        ("images/d.png", b"", "image images/d.png in .*skin cannot be decoded"),
    ],
)
def test_bad_pictures_are_named(folder, load, file, content, message):
    (folder / file).write_bytes(content)
    line = refusal(lambda: load(folder))
    assert re.search(f"^public.path: .*{message}", line), line


def test_folders_that_are_no_data(folder, load, tmp_path):
    for name in MASKS:
        (folder / "masks" / f"{name}.png").write_bytes(png(0 * MASKS[name]))
    (folder / "masks" / "d_segmentation.png").unlink()
    assert refusal(lambda: load(folder)) == f"public.path: {folder}: all 4 masks are empty"
    assert "public.num_examples must be in 1..4 for" in refusal(lambda: load(folder, 5))
    assert "public.num_examples must be in 1..4 for" in refusal(lambda: load(folder, 0))
    (folder / "masks").rename(tmp_path / "masks")
    assert "has no mask of its 4 images, such as masks/a.png" in refusal(lambda: load(folder))
    (folder / "images").rename(tmp_path / "images")
    assert "has no picture, such as images/a.jpg" in refusal(lambda: load(folder))
    assert "is neither a folder nor a zip file" in refusal(lambda: load(tmp_path / "masks/a.png"))
    assert refusal(lambda: load("")).startswith("public.path is not set; it must name a folder")
    assert "does not exist" in refusal(lambda: load(tmp_path / "none"))


@pytest.mark.parametrize("as_zip", [False, True])
def test_pictures_of_all_endings_are_read_and_what_is_none_is_named(tmp_path, load, caplog, as_zip):
    folder = tmp_path / "mixed"
    (folder / "images").mkdir(parents=True)
    endings = {"jpg": "JPEG", "JPG": "JPEG", "tif": "TIFF", "bmp": "BMP", "PNG": "PNG"}
    for number, (ending, kind) in enumerate(endings.items()):
        Image.fromarray(PIXELS["b"]).save(folder / "images" / f"x{number}.{ending}", kind)
    for name in ("a.dcm", "b.txt"):
        (folder / "images" / name).write_bytes(b"-")
    with caplog.at_level(logging.WARNING):
        public = load(zipped(folder) if as_zip else folder, masks=False)
    assert len(public.images) == 5
    (record,) = caplog.records
    words = "2 that are no pictures by their names are not read: "
    assert record.getMessage().endswith(f"{words}images/a.dcm, images/b.txt")
    (folder / "images" / "more").mkdir()
    (folder / "images" / "more" / "x.png").write_bytes(png(PIXELS["b"]))
    source = zipped(folder) if as_zip else folder
    assert "pictures lie at different depths" in refusal(lambda: load(source, masks=False))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("images/b.jpg", "images/b.png"),
        ("b.PNG", "images/b.png"),
        ("masks/b.png", "masks/b.tif"),
        ("masks/b.png", "masks/b_segmentation.png"),
    ],
)
def test_two_files_of_one_image_are_refused(folder, load, one, other):
    for name in (one, other):
        (folder / name).write_bytes(png(PIXELS["b"]))
    assert f"{folder} has both {one} and {other}; b must be one" in refusal(lambda: load(folder))


def test_a_mask_of_another_aspect_is_refused_by_name(folder, load):
    (folder / "images/b.png").write_bytes(png(PIXELS["b"].transpose(1, 0, 2)))
    said = "mask masks/b.png is 24x18, but its image images/b.png is 9x12, of another aspect"
    for _ in range(2):  # the second time nothing is decoded
        assert refusal(lambda: load(folder)) == f"public.path: {folder}: {said}"


def test_images_and_masks_are_turned_as_their_orientation_says(tmp_path, load):
    folder, shown = tmp_path / "turned", np.zeros((60, 40), np.uint8)
    shown[5:20, 5:20] = 255
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (turns, orientation) in enumerate(((0, 1), (1, 6), (2, 3), (3, 8))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.fromarray(np.rot90(shown, turns))
        turned.save(folder / f"images/a{number}.png", exif=exif)
        turned.save(folder / f"masks/a{number}.tif", exif=exif)
    public = load(folder)
    assert np.array_equal(public.labels, np.repeat(shown[None] // 255, 4, axis=0))
    assert all(np.array_equal(original, shown) for original in public.originals)
    assert len(set(public.sha256)) == 1 and np.array_equal(public.images[0], public.images[3])
