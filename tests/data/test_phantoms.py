import time

import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.synthetic import phantoms
from fedhelp_jax.data.synthetic.phantom_tiles import LABEL_NAMES as TILE_NAMES
from fedhelp_jax.data.synthetic.phantom_tiles import MASK_NAMES as NUCLEI_NAMES
from fedhelp_jax.data.synthetic.phantom_tiles import load_phantom_public, phantom_tiles
from fedhelp_jax.data.synthetic.phantoms import load_phantoms, phantom_camera, phantom_images
from fedhelp_jax.data.types import check_federated, image_sha256


def load(num_examples=100, fractions=(0.6, 0.3, 0.1), seed=0, **changes):
    settings = {
        "image_size": 16,
        "validation_fraction": 0.1,
        "test_fraction": 0.25,
        "max_train": None,
    }
    return load_phantoms(
        num_examples=num_examples, fractions=fractions, seed=seed, **(settings | changes)
    )


def test_it_says_that_it_is_synthetic():
    data, public = load(), load_phantom_public(5, 16, 0)
    assert data.synthetic and public.synthetic
    assert all(name.startswith("phantom_") for name in (*data.label_names, *TILE_NAMES))


def test_splits():
    data = check_federated(load())
    assert data.images.shape == (100, 16, 16, 3) and data.images.dtype == np.uint8
    assert data.labels.dtype == np.int32 and len(data.label_names) == 8
    assert [client.name for client in data.clients] == ["client_0", "client_1", "client_2"]
    sizes = [(len(c.train), len(c.validation), len(c.test)) for c in data.clients]
    assert sizes == [(41, 4, 15), (20, 2, 8), (8, 0, 2)]
    everyone = np.concatenate([part for client in data.clients for part in client[1:]])
    assert np.array_equal(np.sort(everyone), np.arange(100))


def test_seed_decides_everything():
    one, again, other = load(), load(), load(seed=1)
    assert np.array_equal(one.images, again.images)
    assert np.array_equal(one.labels, again.labels)
    assert all(map(np.array_equal, one.clients[0][1:], again.clients[0][1:]))
    assert not np.array_equal(one.images, other.images)


def test_a_client_does_not_depend_on_the_others():
    alone, among = load(60, (1.0,)), load(100, (0.6, 0.3, 0.1))
    assert np.array_equal(alone.images, among.images[:60])
    assert np.array_equal(alone.clients[0].validation, among.clients[0].validation)


def test_smallest_clients_have_one_example_of_either():
    data = check_federated(load(6))
    assert [(len(c.train), len(c.test)) for c in data.clients] == [(1, 1)] * 3
    with pytest.raises(UserError, match="5 examples are too few for 3 clients of at least 2"):
        load(5)


def test_cap():
    assert [len(client.train) for client in load(max_train=9).clients] == [9, 9, 8]


def test_many_clients():
    assert len(check_federated(load(400, (0.005,) * 200)).clients) == 200


def test_proportions():
    labels = load(3000, (1.0,), image_size=8).labels
    share = np.bincount(labels, minlength=8) / len(labels)
    assert np.abs(share - phantoms.PROPORTIONS).max() < 0.03
    assert np.isclose(sum(phantoms.PROPORTIONS), 1)


@pytest.mark.parametrize("size", [8, 32, 77])
def test_masks_cover_the_lesions(size):
    labels = np.arange(8).repeat(4)
    images, masks = phantom_images(labels, phantom_camera(0, 0), size, np.random.default_rng(0))
    assert images.shape == (32, size, size, 3)
    assert masks.shape == (32, size, size) and masks.dtype == bool
    area = masks.mean((1, 2))
    assert area.min() > 0.05 and area.max() < 0.75
    grey = images.mean(-1)
    inside, outside = grey[masks].mean(), grey[~masks].mean()
    assert outside - inside > 30  # lesions are darker than skin


def test_images_are_what_they_always_were():
    # Means of colours, noted when the phantoms were first drawn. Not hashes: another CPU may round
    # a cosine another way, but another order of random draws would change these altogether.
    data, public = load(), load_phantom_public(30, 16, 0)
    assert data.labels[:12].tolist() == [1, 1, 6, 1, 1, 4, 1, 3, 1, 2, 1, 0]
    then = [[158.512, 136.895, 116.715], [186.836, 137.770, 132.109], [182.258, 138.215, 122.277]]
    np.testing.assert_allclose(data.images[[0, 60, 99]].mean((1, 2)), then, atol=0.02)
    assert public.labels is not None
    assert public.labels[:12].tolist() == [6, 1, 2, 5, 8, 4, 0, 0, 7, 1, 2, 3]
    then = [[192.695, 159.684, 208.543], [197.129, 182.547, 199.227], [184.914, 173.809, 224.641]]
    np.testing.assert_allclose(public.images[[0, 10, 29]].mean((1, 2)), then, atol=0.02)


@pytest.mark.parametrize("size", [8, 33])
def test_masks_change_neither_images_nor_splits(size):
    classes, lesions = load(image_size=size), check_federated(load(image_size=size, masks=True))
    assert np.array_equal(lesions.images, classes.images)
    for one, other in zip(lesions.clients, classes.clients, strict=True):
        assert one.name == other.name and all(map(np.array_equal, one[1:], other[1:]))
    assert lesions.label_names == phantoms.MASK_NAMES == ("phantom_lesion",)
    assert lesions.labels.shape == (100, size, size) and lesions.labels.dtype == np.uint8
    assert np.array_equal(np.unique(lesions.labels), [0, 1])
    assert lesions.labels.mean((1, 2)).min() > 0.05
    # They lie on the lesions: darker than the skin, on nearly every image.
    grey, inside = lesions.images.mean(-1), lesions.labels == 1
    darker = [g[~m].mean() - g[m].mean() for g, m in zip(grey, inside, strict=True)]
    assert np.mean(np.array(darker) > 10) > 0.95


@pytest.mark.parametrize("size", [8, 33])
def test_masks_of_tiles(size):
    public, plain = load_phantom_public(40, size, 3, masks=True), load_phantom_public(80, size, 3)
    assert public.images.shape == (40, size, size, 3)
    assert public.label_names == NUCLEI_NAMES == ("phantom_nuclei",)
    nuclei = public.labels
    assert nuclei is not None and nuclei.dtype == np.uint8 and nuclei.shape == (40, size, size)
    assert np.array_equal(np.unique(nuclei), [0, 1])
    assert nuclei.mean((1, 2)).min() >= 0.02
    assert public.sha256 == tuple(image_sha256(image) for image in public.originals)
    # The very tiles of the set without masks, some left out, in the same order.
    places = [plain.sha256.index(sha256) for sha256 in public.sha256]
    assert places == sorted(places) and places[-1] > 39
    # What was left out are tissues without nuclei.
    assert plain.labels is not None
    left_out = plain.labels[np.setdiff1d(np.arange(places[-1]), places)]
    assert set(left_out) <= {0, 1, 3, 4}
    # Haematoxylin takes red away.
    red = public.images[..., 0].astype(np.float64)
    paler = [r[m == 0].mean() - r[m == 1].mean() for r, m in zip(red, nuclei, strict=True)]
    assert np.mean(paler) > 20 and np.mean(np.array(paler) > 0) > 0.9


def test_few_tiles_with_masks():
    for seed in range(12):  # of some, the first two tiles have no nuclei
        assert load_phantom_public(1, 8, seed, masks=True).images.shape == (1, 8, 8, 3)


def test_every_client_has_a_camera_of_its_own():
    cameras = [phantom_camera(0, client) for client in range(5)]
    casts = np.concatenate([camera.gain for camera in cameras])
    assert len(np.unique(casts[:, 0])) == 5
    assert np.array_equal(phantom_camera(0, 3).gain, casts[3:4])
    labels = np.zeros(60, np.int32)
    tones = [
        phantom_images(labels, camera, 16, np.random.default_rng(0))[0].mean((0, 1, 2))
        for camera in cameras
    ]
    # Same scenes, other cameras: casts differ by more than a few grey levels.
    ratio = np.log(tones)[:, 0] - np.log(tones)[:, 2]
    assert np.ptp(ratio) > 0.05


def test_one_camera_per_image_or_one_for_all():
    camera, labels = phantom_camera(0, 1), np.arange(6)
    each = phantoms.Cameras(*(np.repeat(leaf, 6, axis=0) for leaf in camera))
    one, _ = phantom_images(labels, camera, 16, np.random.default_rng(0))
    many, _ = phantom_images(labels, each, 16, np.random.default_rng(0))
    assert np.array_equal(one, many)


def test_no_single_sign_tells_the_classes_apart():
    signs = [name.split("_")[1:] for name in phantoms.LABEL_NAMES]
    assert len(set(map(tuple, signs))) == 8
    for hidden in range(3):
        seen = {tuple(s for i, s in enumerate(sign) if i != hidden) for sign in signs}
        assert len(seen) < 8  # without any one of the three, some classes look alike


def test_tiles():
    public = load_phantom_public(None, 16, 0)
    assert public.images.shape == (512, 16, 16, 3)
    assert public.labels is not None and set(public.labels) == set(range(9))
    assert public.label_names == TILE_NAMES and len(TILE_NAMES) == 9
    assert public.sha256 == tuple(image_sha256(image) for image in public.images)
    assert len(set(public.sha256)) == 512
    assert load_phantom_public(512, 16, 0).sha256 == public.sha256
    assert load_phantom_public(512, 16, 1).sha256 != public.sha256


@pytest.mark.parametrize("size", [8, 45])
def test_tiles_of_any_size_and_class(size):
    images, _ = phantom_tiles(np.array([8, 8]), size, np.random.default_rng(0))
    assert images.shape == (2, size, size, 3)
    assert images.std() > 10


def nearest_mean_accuracy(features, labels, half):
    """How often the nearest class mean is right; balanced over classes."""
    features = (features - features[:half].mean(0)) / (features[:half].std(0) + 1e-6)
    classes = np.unique(labels)
    means = np.stack([features[:half][labels[:half] == c].mean(0) for c in classes])
    rest, truth = features[half:], labels[half:]
    answers = classes[np.square(rest[:, None] - means).sum(-1).argmin(1)]
    return np.mean([np.mean(answers[truth == c] == c) for c in classes])


@pytest.mark.slow
def test_difficulty_is_between_chance_and_certainty():
    # Colours and contrast, the crudest features: clearly better than 1/8 and 1/9, far from 1.
    for images, labels, chance in (
        (*load(900, (1.0,), image_size=32)[2:4], 1 / 8),
        (*load_phantom_public(700, 32, 0)[2:4], 1 / 9),
    ):
        assert labels is not None
        middle = images[:, 8:24, 8:24].astype(np.float64)
        features = np.concatenate([middle.mean((1, 2)), middle.std((1, 2))], axis=1)
        accuracy = nearest_mean_accuracy(features, labels, len(labels) * 2 // 3)
        print(f"nearest class mean of colour and contrast: {accuracy:.2f}, chance {chance:.2f}")
        assert chance + 0.08 < accuracy < 0.75


def test_two_thousand_take_seconds():
    start = time.perf_counter()
    load(2000, (1.0,), image_size=32)
    seconds = time.perf_counter() - start
    print(f"2,000 phantoms of 32x32: {seconds:.1f} s")
    assert seconds < 20  # 1.3 s alone on one core; room for a busy machine
