import hashlib
import subprocess
import sys

import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data import types
from fedhelp_jax.data.types import ClientSplit, FederatedDataset, check_federated, image_sha256


def split(name="a", train=(0,), validation=(), test=(1,)):
    return ClientSplit(name, *(np.array(part, np.int32) for part in (train, validation, test)))


def dataset(*clients, labels=(0, 1, 0, 1)):
    images = np.zeros((len(labels), 4, 4, 3), np.uint8)
    return FederatedDataset("toy", True, images, np.array(labels, np.int32), ("x", "y"), clients)


def test_a_client_with_one_example_to_train_on_is_enough():
    toy = dataset(split(), split("b", (2,), (), (3,)))
    assert check_federated(toy) is toy


def distinct(*clients, labels=(0, 1) * 4):
    toy = dataset(*clients, labels=labels)
    toy.images[:] = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return toy


TWO = split("a", (0, 1), (2,), (3,)), split("b", (4,), (), (5, 6))


def test_copies_on_two_sides_of_a_split_are_counted(caplog):
    check_federated(distinct(*TWO))
    toy = distinct(*TWO)
    toy.images[1] = toy.images[0]  # both to train on, which is no matter
    toy.images[7] = toy.images[3]  # nobody's
    assert not caplog.records and check_federated(toy) is toy and not caplog.records
    toy.images[5] = toy.images[0]  # of another client
    toy.images[6] = toy.images[2]
    toy.images[2] = toy.images[4]
    check_federated(toy)
    assert [record.getMessage() for record in caplog.records] == [
        "data toy: 1 of 1 validation examples have the pixels of another in train; the first is "
        "example 2",
        "data toy: 1 of 3 test examples have the pixels of another in train or validation; the "
        "first is example 5",
    ]


def test_pixels_decide_and_not_their_checksum(monkeypatch, caplog):
    monkeypatch.setattr(types.zlib, "crc32", lambda data: 0)
    check_federated(distinct(*TWO))
    assert not caplog.records


def test_a_class_that_nobody_has_is_told(caplog):
    check_federated(distinct(*TWO, labels=(0,) * 7 + (1,)))
    (record,) = caplog.records
    assert record.getMessage() == "data toy: no client has an example of y"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dataset(), "no client has any images"),
        (dataset(split(), split("far", train=())), "client far has no train example"),
        (dataset(split("far", test=())), "client far has no test example"),
        (dataset(split("far", train=(0, 1))), "client far holds an example twice"),
        (dataset(split(), split("far", test=(2,))), "client far holds .* of another client"),
        (dataset(split("far", test=(4,))), "client far has an index outside the pool"),
        (dataset(split(), labels=(0, 0, 0, 2)), "label 2 of example 3 is not in 0..1"),
    ],
)
def test_unusable_data_is_refused_by_name(bad, message):
    with pytest.raises(UserError, match=message):
        check_federated(bad)


def masked(*names, value=1, dtype="uint8", shape=(6, 5)):
    """Two clients of two images, whose masks are larger and hold `value` in one pixel."""
    masks = np.zeros((4, *shape), dtype)
    masks[2, *(1 for _ in shape)] = value
    clients = (split(), split("b", (2,), (), (3,)))
    images = np.zeros((4, 4, 4, 3), np.uint8)
    return FederatedDataset("toy", True, images, masks, names, clients)


@pytest.mark.parametrize(
    ("toy", "classes"),
    [
        (masked("lung"), 2),
        (masked("background", "a"), 2),
        (masked("background", "a", "b", value=2), 3),
        (masked("background", "a", "b", value=2, shape=(4, 5, 6)), 3),
    ],
)
def test_masks_hold_the_classes_of_pixels(toy, classes):
    assert check_federated(toy) is toy
    toy.labels[2, 1, 1] = classes
    with pytest.raises(UserError, match=f"label {classes} of example 2 is not in 0..{classes - 1}"):
        check_federated(toy)


def test_masks_with_negative_values_are_refused():
    with pytest.raises(UserError, match="label -1 of example 2 is not in 0..1"):
        check_federated(masked("lung", value=-1, dtype="int16"))


def test_one_class_of_whole_images_has_no_background():
    toy = dataset(split())._replace(label_names=("x",))
    with pytest.raises(UserError, match="label 1 of example 1 is not in 0..0"):
        check_federated(toy)


def test_hash_is_of_shape_and_pixels():
    image = np.arange(12, dtype=np.uint8).reshape(2, 6)
    assert image_sha256(image) == hashlib.sha256(b"(2, 6)" + bytes(range(12))).hexdigest()
    assert image_sha256(image) != image_sha256(image.reshape(6, 2))
    assert image_sha256(np.asfortranarray(image)) == image_sha256(image)
    with pytest.raises(TypeError, match="uint8"):
        image_sha256(image.astype(np.float64))


def test_data_does_not_bring_jax_along():
    code = "import sys, fedhelp_jax.data.sources; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    roots = {name.split(".")[0] for name in loaded.stdout.split()}
    assert not roots & {"jax", "flax", "rich", "ml_collections"}
