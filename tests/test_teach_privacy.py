"""Only public images leave, and none of them is a client's."""

import numpy as np
import pytest
from commands import refusal
from foundation_server import FoundationServer, status
from teach_config import get_config
from teaching import Study

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.readers.images import resize_arrays
from fedhelp_jax.data.sources import load_federated
from fedhelp_jax.data.types import PublicDataset, image_sha256
from fedhelp_jax.settings.schema import DataConfig
from fedhelp_jax.teachers.base import PublicImages, clear_public

SIZE = 16  # of the run's images


def data_config(**changes) -> DataConfig:
    """The private data of the study's settings."""
    return DataConfig(**(get_config().data.to_dict() | changes))


@pytest.fixture
def study(tmp_path):
    with FoundationServer() as server:
        yield Study(tmp_path, server, SIZE)


def planted(study, image: np.ndarray, place: int = 23) -> str:
    """The hash of a private image, once it is one of the public ones."""
    images = study.images.copy()
    images[place] = image
    study.publish(images)
    return image_sha256(image)


def assert_nothing_leaves(study, capsys, rest: str, words: list[str]) -> None:
    for more in ("", " --dry-run"):
        line = refusal(capsys, study.teach(rest + more))
        for word in words:
            assert word in line, line
    assert study.server.requests == [] and study.server.described == 0
    assert not study.store.exists()


# --- what is sent ---


def test_only_public_images_are_on_the_wire(study):
    study.server.faults = [None, status(500), None]
    assert study.teach("--config.teacher.concurrency=3") == 0
    private = load_federated(data_config(), 0)
    sent = set(study.server.received())
    assert sent == set(study.sha256)
    assert not sent & {image_sha256(image) for image in private.images}
    for request in study.server.requests:
        # No labels, names of files or of clients, nothing but the pixels.
        assert set(request.header) <= {"inputs", "outputs", "parameters"}
        assert request.header.get("parameters", {}) in ({}, {"binary_data_output": True})
        (tensor,) = request.header["inputs"]
        assert set(tensor) <= {"name", "shape", "datatype", "parameters", "data"}
        told = str(request.headers) + request.path + str(request.header)
        for word in (str(study.folder), "client_0", "phantoms", study.public.name):
            assert word not in told


# --- what is not ---


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("number", [0, 1])
def test_an_image_of_a_client_is_never_sent(study, capsys, part, number):
    private = load_federated(data_config(), 0)
    client = private.clients[number]
    row = int(getattr(client, part)[1])
    sha = planted(study, private.images[row])
    words = [client.name, part, f"row {row}", "23", sha]
    assert_nothing_leaves(study, capsys, "", words)


def test_an_image_that_no_client_uses_in_this_run_is_never_sent_either(study, capsys):
    private = load_federated(data_config(max_train=2), 0)
    used = np.concatenate([np.concatenate(client[1:]) for client in private.clients])
    row = int(np.setdiff1d(np.arange(len(private.images)), used)[0])
    sha = planted(study, private.images[row])
    assert_nothing_leaves(study, capsys, "--config.data.max_train=2", [f"row {row}", "23", sha])


def test_a_private_image_among_known_ones_ends_the_run_too(study, capsys):
    """Though all that is left to ask is public."""
    assert study.teach() == 0
    study.server.forget()
    client = load_federated(data_config(), 0).clients[0]
    planted(study, load_federated(data_config(), 0).images[client.train[0]])
    line = refusal(capsys, study.teach())
    assert client.name in line
    assert study.server.requests == []


@pytest.mark.parametrize("form", ["grey at its native size", "colour", "resized"])
def test_a_private_image_is_found_in_other_forms(tmp_path, capsys, form):
    native = 20
    rng = np.random.default_rng(3)
    arrays = {
        f"{part}_{what}": rng.integers(0, high, shape, dtype=np.uint8)
        for part, count in (("train", 20), ("val", 4), ("test", 8))
        for what, high, shape in (
            ("images", 256, (count, native, native)),
            ("labels", 2, (count, 1)),
        )
    }
    file = tmp_path / "pneumoniamnist.npz"
    np.savez(file, allow_pickle=False, **arrays)
    picture = arrays["val_images"][2]
    if form == "colour":
        picture = np.repeat(picture[..., None], 3, axis=-1)
    if form == "resized":
        picture = resize_arrays(picture[None], SIZE)[0]
    with FoundationServer() as server:
        study = Study(tmp_path, server, len(picture))
        if form.startswith("grey"):
            study.publish(study.images[..., 0])
        sha = planted(study, picture)
        rest = f"--config.data.name=medmnist --config.data.path={file}"
        assert_nothing_leaves(study, capsys, rest, ["client_", "row 22", "23", sha])


# --- the type that alone can be sent ---


@pytest.fixture
def private():
    return load_federated(data_config(), 0)


def public_dataset(images: np.ndarray) -> PublicDataset:
    sha256 = tuple(image_sha256(image) for image in images)
    return PublicDataset("mine", False, images, None, None, sha256, images)


def some_images() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)


def test_public_images_have_no_constructor_for_others(private):
    images = some_images()
    sha256 = tuple(image_sha256(image) for image in images)
    for arguments in (
        (),
        (images,),
        (images, sha256),
        (images, sha256, object()),
        (images, sha256, True),
        (private,),
        (private, sha256),
        (private.images, tuple(image_sha256(image) for image in private.images)),
        (public_dataset(images), sha256),
    ):
        with pytest.raises(TypeError):
            PublicImages(*arguments)


def test_only_a_public_data_set_is_cleared(private):
    images = some_images()
    for public in (private, images, list(images), private.clients[0], public_dataset(images)[:]):
        with pytest.raises(TypeError):
            clear_public(public, private)
    for other in (None, images, public_dataset(images)):
        with pytest.raises(TypeError):
            clear_public(public_dataset(images), other)


def test_private_originals_behind_a_public_face_are_found(private):
    """What is compared is what is sent."""
    public = public_dataset(some_images())
    theirs = private.images[:5]
    forged = public._replace(
        originals=theirs, sha256=tuple(image_sha256(image) for image in theirs)
    )
    for dataset in (public._replace(originals=theirs), forged):
        with pytest.raises(UserError):
            assert clear_public(dataset, private).pixels is None


def test_cleared_images_cannot_be_exchanged(private):
    public = public_dataset(some_images())
    cleared = clear_public(public, private)
    np.testing.assert_array_equal(cleared.take([3, 1]).pixels, public.images[[3, 1]])
    with pytest.raises(AttributeError):
        cleared.sha256 = ("0" * 64,) * 5
    with pytest.raises((AttributeError, ValueError)):
        cleared.pixels = private.images[:5]
    public.originals[1] = private.images[0]
    with pytest.raises((UserError, AssertionError)):
        assert not np.array_equal(cleared.pixels[1], private.images[0])
        raise AssertionError("a copy was kept, which is as good")
