"""Examples that cannot be used: refused, or left out as if the source had never held them."""

import csv
import functools
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import fedhelp, read, refusal
from helpers import refusal as refused
from isic_files import FLAGS, isic_config, png
from toy_sets import write_set

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import Bad
from fedhelp_jax.data.readers import images as images_module
from fedhelp_jax.data.readers import stored_set
from fedhelp_jax.data.readers.files import Files
from fedhelp_jax.data.sources import load_federated, load_public
from fedhelp_jax.data.types import FederatedDataset, PublicDataset, of_federated, of_public
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.unused import needed_for
from fedhelp_jax.report.client_distribution import share_rows
from fedhelp_jax.settings.schema import DataConfig, PublicConfig
from fedhelp_jax.teachers.base import clear_public

COUNT, BAD = 20, 3
Load = Callable[[str], FederatedDataset | PublicDataset]


def picture(number: int, shape: tuple[int, ...] = (12, 16, 3)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def mask(number: int, shape: tuple[int, int] = (9, 12)) -> np.ndarray:
    return 255 * np.random.default_rng(100 + number).integers(0, 2, shape, dtype=np.uint8)


DEEP = np.full((12, 16), 4000, np.uint16)  # 16 bits a channel


def write_pictures(
    folder: Path,
    faults: dict[str, bytes | None],
    *,
    masks: bool,
    first: int = 0,
    table: bool = True,
):
    """Writes images, masks and a table; `faults` replace a file, None the whole example."""
    lines = ["image_id,target,center,fold,lesion_id"]
    for number in range(first, first + COUNT):
        name, place = f"i{number:02}", number - first
        if faults.get(name, b"") is None:
            continue
        fold = "test" if place % 5 == 4 else "train"
        lines.append(
            f"{name},{place % 8},{place % 2},{fold},L{place // 4 if fold == 'train' else name}"
        )
        files = {f"images/{name}.png": png(picture(number))}
        if masks:
            files[f"masks/{name}.png"] = png(mask(number))
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(faults.get(file) or content)
    if table:
        (folder / "split.csv").write_text("\n".join(lines) + "\n")


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


def private(
    folder: Path, masks: bool, make: Callable[..., DataConfig] = DataConfig, **settings: Any
) -> Load:
    def load(way: str) -> FederatedDataset:
        common: dict[str, Any] = {"image_size": 8, "volume_size": (8, 8, 8)}
        common |= {"validation_fraction": 0.2, "cache_dir": str(folder / "cache")}
        config = make(on_bad_example=way, **(common | settings))
        return load_federated(config, 0, masks=masks)

    return load


def pictures(folder: Path, masks: bool, source: Path | None = None) -> Load:
    """What `write_pictures` has written."""
    make = functools.partial(isic_config, source or folder, folder / "split.csv", masks=masks)
    return private(folder.parent, masks, make)


def public(folder: Path, masks: bool, **settings: Any) -> Load:
    def load(way: str) -> PublicDataset:
        config, cache = PublicConfig(**settings), str(folder / "cache")
        return load_public(config, 8, 0, masks=masks, cache_dir=cache, skip_bad=way == "skip")

    return load


def isic(file: str = "images/i03.png", content: bytes = b"-", *, masks=False, as_zip=False):
    """A folder with a table, where one file is other than it should be."""

    def write(folder: Path, broken: bool) -> Load:
        name = Path(file).stem
        write_pictures(folder / "isic", {file: content} if broken else {name: None}, masks=masks)
        source = zipped(folder / "isic") if as_zip else folder / "isic"
        return pictures(folder / "isic", masks, source)

    return write


def public_folder(file: str, content: bytes, num_examples: int | None = None):
    masks = file.startswith("masks")

    def write(folder: Path, broken: bool) -> Load:
        name = Path(file).stem
        faults = {file: content} if broken else {name: None}
        write_pictures(folder / "set", faults, masks=masks, table=False)
        source = {"path": str(folder / "set"), "num_examples": num_examples}
        return public(folder, masks, name="folder", **source)

    return write


def stored(kind: str, break_it: Callable[[dict[str, np.ndarray]], None], **settings: Any):
    """An .npz file; for MedMNIST the bad example is one of the split `val`."""

    def write(folder: Path, broken: bool) -> Load:
        images, labels = np.stack([picture(n) for n in range(COUNT)]), np.arange(COUNT) % 2
        arrays = {"images": images, "labels": labels, "label_names": np.array(["no", "yes"])}
        if kind != "npz":
            arrays["masks"] = np.stack([mask(n) // 255 for n in range(COUNT)])
            arrays["label_names"] = np.array(["lesion"])
            arrays["names"] = np.array([f"i{n:02}" for n in range(COUNT)])
            arrays["site"] = np.arange(COUNT) // 10
            del arrays["labels"]
        if broken:
            break_it(arrays)
        else:
            kept = {"images", "labels", "masks", "names", "site"} & arrays.keys()
            arrays |= {name: np.delete(arrays[name], BAD, axis=0) for name in kept}
        if kind == "medmnist":
            first, last = (2, 5) if broken else (2, 4)
            parts = {"train": slice(0, first), "val": slice(first, last), "test": slice(last, None)}
            arrays = {
                f"{part}_{what}": array[places]
                for part, places in parts.items()
                for what, array in {"images": arrays["images"], "labels": labels_of(arrays)}.items()
            }
        folder.mkdir(parents=True)
        np.savez(folder / "pneumoniamnist.npz", allow_pickle=False, **arrays)
        if kind == "npz":
            return public(folder, False, name="npz", path=str(folder / "pneumoniamnist.npz"))
        masks = kind == "npz_masks"
        return private(
            folder, masks, name=kind, path=str(folder / "pneumoniamnist.npz"), **settings
        )

    return write


def labels_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return arrays.get("labels", arrays["site"] if "site" in arrays else np.zeros(0, int))


def prepared(break_it: Callable[[dict[str, Any]], None], *, what: str, is_public=False, **settings):
    """A prepared set with sites and groups: classes with an official split, masks or volumes."""

    def write(folder: Path, broken: bool) -> Load:
        import tensorflow_datasets as tfds

        grey = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        features = {
            "id": tfds.features.Text(),
            "site": tfds.features.ClassLabel(names=["north", "south"]),
            "group": tfds.features.Text(),
        }
        if what == "volumes":
            features["volume"] = tfds.features.Tensor(shape=(8, 9, 10), dtype=np.float32)
            features["mask"] = tfds.features.Tensor(shape=(8, 9, 10), dtype=np.uint8)
        else:
            features["image"] = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            labelled = tfds.features.ClassLabel(names=["no", "yes"])
            features |= {"mask": grey} if what == "masks" else {"label": labelled}
        examples = []
        for number in range(COUNT):
            example: dict[str, Any] = {
                "id": f"i{number:02}",
                "site": number % 2,
                "group": f"p{number // 2}",
                "image": picture(number),
                "label": number % 2,
                "mask": mask(number),
                "volume": np.random.default_rng(number).normal(size=(8, 9, 10)).astype(np.float32),
            }
            if what == "volumes":
                example["mask"] = (example["volume"] > 0).astype(np.uint8)
            examples.append({name: example[name] for name in features})
        if broken:
            break_it(examples[BAD])
        else:
            del examples[BAD]
        splits = {"train": examples}
        if what == "classes":
            splits = {"train": examples[:-8], "test": examples[-8:]}
        metadata = {"labels": {"0": "outside", "1": "inside"}} if what == "volumes" else None
        write_set(folder / "data", "toy", features, splits, metadata)
        masks = what != "classes"
        if is_public:
            return public(folder, masks, name="tfds:toy", path=str(folder / "data"), **settings)
        return private(folder, masks, name="tfds:toy", path=str(folder / "data"), **settings)

    return write


def change(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda example: example.update({name: value})


def change_one(name: str, value: int) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        array = labels_of(arrays) if name == "labels" else arrays[name]
        array[BAD] = value

    return change


NAN = np.full((8, 9, 10), np.nan, np.float32)
# The source, words of the reason, and split, client, example and files of the example.
KINDS = {
    "undecodable": (
        isic(),
        "images/i03.png in .* cannot be decoded",
        ("train", "center_1", "i03", "images/i03.png"),
    ),
    "the first, in a zip": (
        isic("images/i00.png", png(picture(0))[:90], as_zip=True),
        "images/i00.png in .* cannot be decoded",
        ("train", "center_0", "i00", "images/i00.png"),
    ),
    "16 bits, of the test": (
        isic("images/i04.png", png(DEEP)),
        "images/i04.png in .* has 16 bits a channel",
        ("test", "center_0", "i04", "images/i04.png"),
    ),
    "no mask": (
        isic("masks/i03.png", png(picture(3, (9, 12))), masks=True),
        "mask masks/i03.png is grey on",
        ("train", "center_1", "i03", "images/i03.png masks/i03.png"),
    ),
    "a first mask of another size": (
        isic("masks/i00.png", png(mask(0, (18, 24))), masks=True),
        "is 24x18, but|is 12x9, but",
        ("train", "center_0", "i00", "images/i00.png masks/i00.png"),
    ),
    "another aspect": (
        isic("images/i03.png", png(picture(3, (16, 12, 3))), masks=True),
        "its image images/i03.png is 12x16, of another aspect",
        ("train", "center_1", "i03", "images/i03.png masks/i03.png"),
    ),
    "a mask of no class in an npz, by site": (
        stored("npz_masks", change_one("masks", 7)),
        "mask i03 holds 7",
        ("", "site_0", "i03", "pneumoniamnist.npz"),
    ),
    "a mask of no class in an npz, by fractions": (
        stored("npz_masks", change_one("masks", 7), split_by="fractions", fractions=(0.6, 0.4)),
        "mask i03 holds 7",
        ("", "", "i03", "pneumoniamnist.npz"),
    ),
    "a label of MedMNIST": (
        stored("medmnist", change_one("labels", -1), fractions=(0.6, 0.4)),
        "val_labels holds -1",
        ("train", "", "val 1", "pneumoniamnist.npz"),
    ),
    "prepared, 16 bits": (
        prepared(change("image", DEEP), what="classes"),
        "example i03 of toy has 16 bits a channel",
        ("train", "south", "i03", "toy"),
    ),
    "prepared, shared out": (
        prepared(change("image", DEEP), what="classes", split_by="iid", num_clients=3),
        "example i03 of toy has 16 bits a channel",
        ("train", "", "i03", "toy"),
    ),
    "prepared, no label": (
        prepared(change("label", -1), what="classes"),
        "label -1 of example i03",
        ("train", "south", "i03", "toy"),
    ),
    "prepared, a mask of another aspect": (
        prepared(change("mask", mask(3, (12, 9))), what="masks"),
        "example i03 of toy has a mask of 12 x 9",
        ("", "south", "i03", "toy"),
    ),
    "prepared, NaN voxels": (
        prepared(change("volume", NAN), what="volumes"),
        "example i03 of toy: 720 of 720 voxels are NaN",
        ("", "south", "i03", "toy"),
    ),
    "public": (
        public_folder("images/i03.png", b"-"),
        "images/i03.png in .* cannot be decoded",
        ("", "", "i03", "images/i03.png"),
    ),
    "public masks, a subset": (
        public_folder("masks/i03.png", png(mask(3, (18, 12))), num_examples=7),
        "mask masks/i03.png in .* is 12x18, but",
        ("", "", "i03", "images/i03.png masks/i03.png"),
    ),
    "public npz": (
        stored("npz", change_one("labels", 5)),
        "label 5 is out of range",
        ("", "", "example 3", "pneumoniamnist.npz"),
    ),
    "public prepared, a subset": (
        prepared(change("image", DEEP), what="classes", is_public=True, num_examples=18),
        "example i03 of toy has 16 bits a channel",
        ("", "", "i03", "toy"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_as_if_the_bad_example_had_never_been_there(
    tmp_path, kind, monkeypatch, caplog
):
    write, reason, place = KINDS[kind]
    without, load = write(tmp_path / "clean", False)("refuse"), write(tmp_path / "bad", True)
    caplog.clear()
    left = load("skip")
    (bad,) = left.left_out
    assert bad[:4] == place
    (warning,) = (r.getMessage() for r in caplog.records if "on_bad_example" in r.getMessage())
    assert "skip: 1 " in warning and warning.endswith(bad.reason)
    assert_equal(left, without)
    for _ in range(2):  # also beside a cache of what is left
        with pytest.raises(UserError, match=reason):
            load("refuse")
    with monkeypatch.context() as patch:

        def decode(*_: object) -> None:
            raise AssertionError("decoded again")

        patch.setattr(images_module, "decode_picture", decode)
        patch.setattr(stored_set, "decode_picture", decode)
        again = load("skip")
    assert again.left_out == left.left_out
    assert_equal(again, without)


def assert_equal(one, two):
    if isinstance(one, PublicDataset):
        assert of_public(one) == of_public(two)
        assert all(map(np.array_equal, one.originals, two.originals))
        return
    assert isinstance(two, FederatedDataset) and one.label_names == two.label_names
    assert [client.name for client in one.clients] == [client.name for client in two.clients]
    assert of_federated(one) == of_federated(two)


def test_left_out_examples_of_nobody_have_a_row_of_their_own(tmp_path):
    data = KINDS["prepared, shared out"][0](tmp_path, True)("skip")
    assert isinstance(data, FederatedDataset)
    *rows, last = share_rows(data, ["small"] * 3)
    assert len(rows) == 9 and not any(row["left_out"] for row in rows)
    assert last == {
        **{"client": "", "role": "", "split": "train", "examples": 0, "left_out": 1},
        **{"no": 0, "yes": 0},
    }


def test_more_than_half_is_refused(tmp_path):
    write_pictures(tmp_path, {f"images/i{n:02}.png": b"-" for n in range(1, 12)}, masks=False)
    load = pictures(tmp_path, False)
    assert "11 of 20 examples cannot be used: too many to be left out" in refused(
        lambda: load("skip")
    )
    write_pictures(tmp_path, {f"images/i{n:02}.png": b"-" for n in range(COUNT)}, masks=False)
    assert "20 of 20 examples cannot be used: too many" in refused(lambda: load("skip"))


def test_a_client_without_any_example_left_is_named(tmp_path, caplog):
    names = [f"i{n:02}" for n in range(COUNT)]
    write_pictures(tmp_path, {f"images/{n}.png": b"-" for n in names[1:8:2]}, masks=False)
    table = tmp_path / "split.csv"
    lines = table.read_text().splitlines()
    kept = [line for line in lines if line[:3] not in names[9::2]]
    table.write_text("\n".join(kept).replace("i07,7,1,train", "i07,7,1,test") + "\n")
    data = pictures(tmp_path, False)("skip")
    assert isinstance(data, FederatedDataset)
    assert [client.name for client in data.clients] == ["center_0"]
    assert "no example is left of center_1" in caplog.text


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    load = isic()(tmp_path, False)
    read_file = Files.read

    def fail(self, name):
        if name == "images/i05.png":
            raise OSError(5, "Input/output error")
        return read_file(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "read", fail)
        (bad,) = load("skip").left_out
    assert bad.example == "i05" and "Input/output error" in bad.reason
    assert load("skip").left_out == ()


def test_the_image_of_a_bad_mask_is_private_all_the_same(tmp_path):
    data = isic("masks/i03.png", b"-", masks=True)(tmp_path, True)("skip")
    assert isinstance(data, FederatedDataset)
    write_pictures(tmp_path / "public", {}, masks=False, first=3, table=False)
    shown = public(tmp_path, False, name="folder", path=str(tmp_path / "public"))("refuse")
    assert isinstance(shown, PublicDataset)
    only = shown._replace(
        images=shown.images[:1], sha256=shown.sha256[:1], originals=shown.originals[:1]
    )
    assert "left out by data.on_bad_example" in refused(lambda: clear_public(only, data))


def test_the_setting_is_for_what_is_read_from_files():
    needed = needed_for(RunConfig(), "data.on_bad_example")
    assert needed.startswith("data.name = folder, ") and " or public.name = npz, " in needed
    public = RunConfig(public=PublicConfig(name="folder"))
    assert needed_for(public, "data.on_bad_example") == ""


@pytest.mark.slow
def test_a_run_tells_what_it_left_out(tmp_path, capsys, caplog):
    write_pictures(tmp_path / "isic", {"images/i03.png": b"-"}, masks=False)
    write_pictures(tmp_path / "shown", {"images/i41.png": b"-"}, masks=False, first=40, table=False)
    folder = tmp_path / "run"
    small = "--config.model.small=cnn_small --config.model.large=cnn_small --config.roles.top_n=1"
    command = (
        f"train --config={Path(__file__).parents[1] / 'tiny_config.py'} --workdir={folder} "
        f"--config.mapping.cpu_devices={jax.device_count()} --config.rounds=1 {small} "
        "--config.algorithm.name=feddf --config.teacher.name=none --config.public.num_examples=8 "
        f"{FLAGS} --config.data.path={tmp_path / 'isic'} "
        f"--config.public.name=folder --config.public.path={tmp_path / 'shown'} "
        f"--config.data.cache_dir={tmp_path / 'cache'}"
    )
    assert "images/i03.png" in refusal(capsys, fedhelp(command))
    assert fedhelp(f"{command} --config.data.on_bad_example=skip") == 0
    told = [line for line in caplog.messages if "on_bad_example = skip" in line]
    assert ["1 private" in line for line in told] == [True, False]
    printed = capsys.readouterr().out
    assert "private examples left out" in printed and "public examples left out" in printed
    assert read(folder / "summary.json")["left_out"] == {"private": 1, "public": 1}
    with (folder / "quarantine.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["source"], r["client"], r["split"], r["files"]) for r in rows] == [
        ("private", "center_1", "train", "images/i03.png"),
        ("public", "", "", "images/i41.png"),
    ]
    assert all("cannot be decoded" in row["reason"] for row in rows)
    with (folder / "shares.csv").open(newline="") as file:
        counts = {(r["client"], r["split"]): int(r["left_out"]) for r in csv.DictReader(file)}
    assert counts.pop(("center_1", "train")) == 1 and not any(counts.values())
    swept = command.replace("train", "sweep", 1).replace(str(folder), str(tmp_path / "sweep"))
    assert fedhelp(f"{swept} --config.data.on_bad_example=skip --sweep=learning_rate=0.01,0.1") == 0
    with (tmp_path / "sweep/runs.csv").open(newline="") as file:
        assert [row["left_out"] for row in csv.DictReader(file)] == ["2", "2"]
    assert "images/i03.png" in refusal(capsys, fedhelp(command))
    assert "images/i03.png" in refusal(capsys, fedhelp(f"{command} --overwrite"))
    assert not (folder / "quarantine.csv").exists()


@pytest.mark.parametrize(("least", "wrong"), [(0, [0, 3]), (-1, [3])])
def test_labels_outside_the_classes_of_a_prepared_set(least, wrong):
    """TFDS does not write them; of public ones -1 stands for no label."""
    features = {"label": types.SimpleNamespace(names=["no", "yes"])}
    made: Any = types.SimpleNamespace(masks=False, features=features)
    bad, targets = Bad(skip=True), np.array([-1, 0, 1, 2])
    _, names = stored_set.StoredSet.labels(
        made, targets, list("abcd"), "public.name: x", bad, least=least
    )
    assert names == ("no", "yes") and sorted(bad.reasons) == wrong
    assert bad.reasons[3] == "public.name: x: label 2 of example d is not in 0..1"
