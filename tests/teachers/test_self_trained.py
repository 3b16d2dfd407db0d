import jax
import numpy as np
import pytest
from helpers import public_images, tiny_model, tiny_public

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import PublicDataset, image_sha256
from fedhelp_jax.teachers.backends import self_trained
from fedhelp_jax.teachers.backends.self_trained import SelfTrained
from fedhelp_jax.teachers.base import FoundationModel

COUNT, CLASSES, EPOCHS = 90, 3, 300


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Tiny networks in place of ResNet-20, whose compilation takes longer than all tests here."""

    def network(depth, num_classes):
        assert depth == 20
        return tiny_model(num_classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_trained, "resnet", network)
        yield


def easy_public(count=COUNT) -> PublicDataset:
    """Noise whose brightness tells its class; the last image is the first one mislabelled."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    noise = rng.integers(0, 80, (count, 8, 8, 3))
    images = (noise + 80 * labels[:, None, None, None]).astype(np.uint8)
    images[-1], labels[-1] = images[0], (labels[0] + 1) % CLASSES
    sha256 = tuple(image_sha256(image) for image in images)
    names = ("dark", "grey", "bright")
    return PublicDataset("easy", True, images, labels, names, sha256, images)


def asked(public, seed=0) -> FoundationModel:
    return SelfTrained(public, EPOCHS, seed)


@pytest.fixture(scope="module")
def public():
    return easy_public()


@pytest.fixture(scope="module")
def images(public):
    return public_images(public.originals)


@pytest.fixture(scope="module")
def answers(public, images):
    """To every image but the last, which is the first once more."""
    return asked(public).answer(images)


def test_answers_are_better_than_chance(public, answers):
    assert answers.shape == (COUNT - 1, CLASSES) and answers.dtype == np.float32
    assert np.mean(answers.argmax(axis=1) == public.labels[:-1]) >= 0.8  # chance is 1/3


def test_answers_are_seeded_and_in_the_order_asked(public, images, answers):
    order = np.random.default_rng(1).permutation(COUNT - 1)[:20].tolist()
    model = asked(public)
    np.testing.assert_array_equal(model.answer(images.take(order)), answers[order])
    np.testing.assert_array_equal(model.answer(images.take(order[:1])), answers[order[:1]])
    assert model.request_bytes(images) == 0
    assert not np.array_equal(asked(public, seed=1).answer(images), answers)


def test_no_image_is_answered_with_its_own_label(public, images, answers):
    """Another label changes the answers about the other half, and of none in its own half."""
    half = np.array([int(sha[:8], 16) % 2 for sha in images.sha256])
    assert min(half.sum(), (1 - half).sum()) >= COUNT // 3
    labels = public.labels.copy()
    labels[0] = (labels[0] + 2) % CLASSES
    after = asked(public._replace(labels=labels)).answer(images)
    same = half == half[0]
    np.testing.assert_array_equal(after[same], answers[same])
    assert (after[~same] != answers[~same]).any(axis=1).all()


def test_the_fingerprint_changes_with_all_that_is_trained_on(public):
    fingerprint = SelfTrained(public, 7, 3).fingerprint
    assert fingerprint.name == "self-trained resnet20 on easy"
    assert fingerprint.version.startswith("7 epochs of batches of 32, seed 3, sha256 ")
    assert fingerprint.preprocessing == "resized to 8x8, signed"
    assert fingerprint.label_names == public.label_names
    labels = public.labels.copy()
    labels[5] = (labels[5] + 1) % CLASSES
    larger = np.repeat(np.repeat(public.images, 2, axis=1), 2, axis=2)
    others = [
        SelfTrained(public, 8, 3),
        SelfTrained(public, 7, 4),
        SelfTrained(public._replace(labels=labels), 7, 3),
        SelfTrained(public._replace(images=larger), 7, 3),
        SelfTrained(public._replace(sha256=public.sha256[::-1]), 7, 3),
        SelfTrained(easy_public(COUNT - 1), 7, 3),
    ]
    digests = {fingerprint.digest, *(other.fingerprint.digest for other in others)}
    assert len(digests) == 1 + len(others)
    assert SelfTrained(public, 7, 3).fingerprint == fingerprint


def test_nothing_is_trained_before_it_is_asked(public, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)
    model = asked(public)
    assert model.fingerprint.digest and model.batch_limit is None
    model.close()


def test_what_cannot_be_answered(public):
    with pytest.raises(UserError, match="^teacher.name: .*tiny_public has none; use another"):
        SelfTrained(tiny_public()._replace(labels=None, label_names=None), 3, 0)
    one = public._replace(images=public.images[:1], sha256=public.sha256[:1])
    with pytest.raises(UserError, match="^public.num_examples: 1 images of easy are too few"):
        SelfTrained(one._replace(labels=public.labels[:1]), 3, 0)
    strangers = tiny_public(2)
    images = public_images(np.concatenate([public.originals[:3], strangers.originals]))
    words = f"images of easy only; 2 of 5 are others, the first has sha256 {strangers.sha256[0]}"
    with pytest.raises(UserError, match=f"^teacher.name: .*{words}"):
        asked(public).answer(images)
