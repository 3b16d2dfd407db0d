import numpy as np
import pytest
from isic_files import isic_config

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.readers import folder as reader
from fedhelp_jax.data.readers.images import Decoded
from fedhelp_jax.data.sources import load_federated, load_public
from fedhelp_jax.settings.schema import DataConfig, PublicConfig


def test_phantoms_are_the_default():
    config = DataConfig(num_examples=120, image_size=8)
    data = load_federated(config, seed=0)
    assert data.name == "phantoms" and data.synthetic and len(data.clients) == 6
    assert np.array_equal(data.images, load_federated(config, seed=0).images)
    public = load_public(PublicConfig(num_examples=20), 8, seed=0)
    assert public.images.shape == (20, 8, 8, 3)


def test_clients_can_be_tested_on_the_images_of_all():
    own = load_federated(DataConfig(num_examples=120, image_size=8), seed=0)
    data = load_federated(DataConfig(num_examples=120, image_size=8, test_on="all"), seed=0)
    tests = sorted(i for client in own.clients for i in client.test.tolist())
    for client, before in zip(data.clients, own.clients, strict=True):
        assert client.test.tolist() == tests
        np.testing.assert_array_equal(client.train, before.train)
        np.testing.assert_array_equal(client.validation, before.validation)


def test_unknown_names():
    with pytest.raises(
        UserError, match="data.name = 'mnist' must be one of phantoms, .*package.module:object"
    ):
        load_federated(DataConfig(name="mnist"), 0)
    with pytest.raises(
        UserError, match="public.name = 'web' must be one of phantoms, .*, none, or package"
    ):
        load_public(PublicConfig(name="web"), 8, 0)


@pytest.mark.parametrize("split", ["official", "grouped"])
def test_real_centres(real, split, monkeypatch):
    if split == "official":
        # Its images are mostly those of "grouped": once is enough to decode them.
        def blank(source, names, size, **_):
            images = np.full((len(names), size, size, 3), 150, np.uint8)
            return Decoded(images, np.full((len(names), 2), size), ())

        monkeypatch.setattr(reader, "load_images", blank)
    config = isic_config(
        real / "ham10000_200x150.zip",
        real / "fed_isic2019_ham_split.csv",
        split=split,
    )
    data = load_federated(config, seed=0)
    assert [client.name for client in data.clients] == [f"center_{k}" for k in (1, 2, 3, 5)]
    assert [len(client.test) for client in data.clients] == [791, 672, 452, 88]
    trains = [len(client.train) + len(client.validation) for client in data.clients]
    official = [3163, 2691, 1807, 351]
    if split == "official":
        assert trains == official
    else:
        assert all(few < many for few, many in zip(trains, official, strict=True))
    for client, count in zip(data.clients, trains, strict=True):
        assert 0.07 < len(client.validation) / count <= 0.1
    assert data.images.shape[1:] == (32, 32, 3) and 100 < data.images.mean() < 200


def test_real_pneumonia(real):
    config = DataConfig(
        name="medmnist", path=str(real / "pneumoniamnist_rebuilt.npz"), image_size=28
    )
    data = load_federated(config, seed=0)
    assert data.label_names == ("normal", "pneumonia")
    assert sum(len(c.train) + len(c.validation) for c in data.clients) == 5232
    assert sum(len(c.test) for c in data.clients) == 624


@pytest.mark.parametrize(
    ("name", "count", "classes"),
    [("pathmnist_1000_clip", 1000, 9), ("cifar100_6000", 6000, 100)],
)
def test_real_public(real, name, count, classes):
    public = load_public(PublicConfig(name="npz", path=str(real / f"{name}.npz")), 32, 0)
    assert public.images.shape == (count, 32, 32, 3)
    assert public.label_names is not None and len(public.label_names) == classes


def test_public_classes_that_no_image_shows_are_told(tmp_path, caplog):
    names, images = np.array(["a", "b", "c"]), np.zeros((4, 8, 8), np.uint8)
    images[:, 0, 0] = range(4)
    file = tmp_path / "shown.npz"
    np.savez(file, images=images, labels=np.array([0, 2, 0, 2]), label_names=names)
    load_public(PublicConfig(name="npz", path=str(file)), 8, 0)
    assert caplog.messages == ["public shown: there is no image of b"]
