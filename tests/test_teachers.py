import hashlib
import json
import math
import sys

import numpy as np
import pytest
from helpers import PUBLIC_CLASSES, tiny_public

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import image_sha256
from fedhelp_jax.teachers.answers import Answers, join_answers, load_answers, save_answers
from fedhelp_jax.teachers.backends.simulated import simulated

COUNT, CLASSES = 10, 7
SUFFIXES = (".npz", ".safetensors", ".npy")


@pytest.fixture
def public():
    return tiny_public(COUNT)


@pytest.fixture
def answers(public):
    logits = np.random.default_rng(0).normal(size=(COUNT, CLASSES)).astype(np.float32)
    names = tuple(f"class {i}" for i in range(CLASSES))
    return Answers(logits, public.sha256, names, "clip ViT-L/14 sha256:abc")


def stored(path, **changes):
    """A file of answers with some of its arrays replaced, or left out where None."""
    arrays = {
        "logits": np.zeros((3, 2), np.float32),
        "sha256": np.array(["a", "b", "c"]),
        "label_names": np.array(["x", "y"]),
        "fingerprint": np.array("f"),
    }
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


def path_of(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is absent")
    return tmp_path / f"a{suffix}"


def refusal(path, array=None):
    with pytest.raises(UserError) as error:
        load_answers(path, array)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("teacher.path: ") and str(path) in message
    return message


# --- files ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_gives_back_what_was_saved(tmp_path, answers, suffix):
    save_answers(path_of(tmp_path, suffix), answers)
    loaded = load_answers(tmp_path / f"a{suffix}")
    assert loaded.logits.dtype == np.float32
    np.testing.assert_array_equal(loaded.logits, answers.logits)
    assert loaded[1:] == answers[1:]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("labelled", [True, False])
def test_masks_and_embeddings_are_given_back_too(tmp_path, public, answers, suffix, labelled):
    """Masks have a row per image and their classes last; embeddings have no label names."""
    logits = np.random.default_rng(1).normal(size=(COUNT, 3, 2, CLASSES)).astype(np.float32)
    names = answers.label_names if labelled else ()
    saved = answers._replace(logits=logits, label_names=names)
    save_answers(path_of(tmp_path, suffix), saved)
    loaded = load_answers(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(loaded.logits, logits)
    assert loaded[1:] == saved[1:]
    np.testing.assert_array_equal(join_answers(loaded, public), logits)


def test_names_that_are_not_ascii_are_given_back(tmp_path, answers):
    odd = answers._replace(label_names=tuple("αβγδεζ") + ("ß, \n",), fingerprint="Modèle 1")
    for suffix in SUFFIXES:
        save_answers(path_of(tmp_path, suffix), odd)
        assert load_answers(tmp_path / f"a{suffix}")[1:] == odd[1:]


def test_another_suffix_is_refused(tmp_path, answers):
    for name in ("a.txt", "a", "a.npz.gz", "a.pkl"):
        assert refusal(tmp_path / name).endswith("must end in .npz, .safetensors or .npy")
        with pytest.raises(UserError, match="must end in .npz, .safetensors or .npy"):
            save_answers(tmp_path / name, answers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_and_byte_strings_are_read(tmp_path, dtype):
    path = stored(
        tmp_path / "a.npz",
        logits=np.arange(6, dtype=dtype).reshape(3, 2),
        sha256=np.array([b"a", b"b", b"c"]),
        label_names=np.array([b"x", b"y"]),
        fingerprint=np.array(["f"]),
    )
    loaded = load_answers(path)
    assert loaded.logits.dtype == np.float32 and loaded.logits.sum() == 15
    assert loaded[1:4] == (("a", "b", "c"), ("x", "y"), "f")


def nan_at(row):
    logits = np.zeros((3, 2), np.float32)
    logits[row:, 1] = math.nan
    return logits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": None}, ["lacks the array 'logits'"]),
        ({"sha256": None}, ["lacks the array 'sha256'"]),
        ({"label_names": None}, ["lacks the array 'label_names'"]),
        ({"fingerprint": None}, ["lacks the array 'fingerprint'"]),
        ({"logits": np.zeros((3, 2), int)}, ["logits", "must be floats [M, F]", "int64 [3, 2]"]),
        ({"logits": np.zeros((3, 2), complex)}, ["must be floats", "complex128"]),
        ({"logits": np.zeros(3)}, ["must be floats [M, F]", "float64 [3]"]),
        ({"logits": np.array([["a"]] * 3)}, ["must be floats"]),
        ({"logits": nan_at(1)}, ["must be finite; 2 rows", "row 1"]),
        ({"logits": np.full((3, 2), np.inf)}, ["must be finite; 3 rows", "row 0"]),
        ({"sha256": np.array(["a", "b"])}, ["one sha256 per row", "[3, 2]", "[2]"]),
        ({"label_names": np.array(["x"])}, ["one label name per column", "[1]"]),
        ({"logits": np.array([[{}]] * 3, object)}, ["is no readable .npz file"]),
        ({"sha256": np.array(["a", "b", None], object)}, ["is no readable .npz file"]),
    ],
    ids=lambda value: str(value)[:60].replace("\n", "") if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, changes, words):
    message = refusal(stored(tmp_path / "a.npz", **changes))
    for word in words:
        assert word in message


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"logits,sha256\n", b"PK\x03\x04 cut off"])
def test_files_that_are_none(tmp_path, content, suffix):
    path_of(tmp_path, suffix).write_bytes(content)
    assert f"is no readable {suffix} file" in refusal(tmp_path / f"a{suffix}")


def test_damaged_files(tmp_path, answers):
    """Cut off, or with bytes flipped somewhere in the compressed logits."""
    path = tmp_path / "a.npz"
    save_answers(path, answers)
    whole = path.read_bytes()
    damaged = [whole[: len(whole) // 2]]
    for start in (60, 100, 150, 200):
        flipped = bytes(255 - byte for byte in whole[start : start + 4])
        damaged.append(whole[:start] + flipped + whole[start + 4 :])
    for content in damaged:
        path.write_bytes(content)
        assert "is no readable .npz file" in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path, suffix):
    assert "there is no file" in refusal(path_of(tmp_path, suffix))


def test_a_single_array_is_no_file_of_answers(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    assert "is no readable .npz file (a single array)" in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_a_folder_is_no_file_of_answers(tmp_path, suffix):
    path_of(tmp_path, suffix).mkdir()
    refusal(tmp_path / f"a{suffix}")


# --- embeddings, and which array holds the answers ---


def test_embeddings_stand_in_place_of_logits(tmp_path):
    """Without label names, though the file should have some; logits go before them."""
    embeddings = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = stored(tmp_path / "a.npz", logits=None, embeddings=embeddings)
    loaded = load_answers(path)
    np.testing.assert_array_equal(loaded.logits, embeddings)
    assert loaded.label_names == () and loaded.fingerprint == "f"
    stored(path, logits=None, label_names=None, embeddings=embeddings)
    assert load_answers(path).label_names == ()
    stored(path, embeddings=embeddings)
    assert load_answers(path).label_names == ("x", "y")
    loaded = load_answers(path, "embeddings")
    np.testing.assert_array_equal(loaded.logits, embeddings)
    assert loaded.label_names == ()


def test_an_array_may_be_named(tmp_path):
    path = stored(tmp_path / "a.npz", logits=None, pooled=np.ones((3, 4)), other=np.ones((3, 5)))
    assert load_answers(path, "pooled").logits.shape == (3, 4)
    hint = "; teacher.array may name one of pooled, other"
    assert refusal(path).endswith(f"lacks the array 'logits'{hint}")
    assert refusal(path, "poled").endswith(f"lacks the array 'poled'{hint}")


def test_images_may_stand_in_place_of_hashes(tmp_path, public):
    """A plain file of embeddings knows nothing of us: not even who made it."""
    images = public.images[:3]
    path = tmp_path / "mine.npz"
    file = {"sha256": None, "fingerprint": None, "label_names": None, "logits": None}
    file |= {"images": images, "embeddings": np.ones((3, 4))}
    loaded = load_answers(stored(path, **file))
    assert loaded.sha256 == public.sha256[:3] and loaded.label_names == ()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.fingerprint == f"mine (sha256 {digest[:12]})"
    assert load_answers(stored(path, **file | {"fingerprint": "F"})).fingerprint == "F"
    file |= {"logits": np.ones((3, 2)), "label_names": ["x", "y"]}
    assert load_answers(stored(path, **file)).label_names == ("x", "y")
    both = file | {"sha256": ["a", "b", "c"], "fingerprint": "F"}
    assert load_answers(stored(path, **both)).sha256 == ("a", "b", "c")
    grey = images[..., 0]
    loaded = load_answers(stored(path, **file | {"images": grey}))
    assert loaded.sha256 == tuple(image_sha256(image) for image in grey)
    assert "one sha256 per row" in refusal(stored(path, **file | {"images": images[:2]}))
    assert "images must be uint8" in refusal(stored(path, **file | {"images": images / 255}))


def test_real_embeddings_are_read(real):
    path = real / "pathmnist_1000_clip.npz"
    loaded = load_answers(path, "clip_embeddings")
    assert loaded.logits.shape == (1000, 512) and loaded.label_names == ()
    assert loaded.fingerprint.startswith("pathmnist_1000_clip (sha256 ")
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(loaded.logits, file["clip_embeddings"])
        assert loaded.sha256[7] == image_sha256(file["images"][7])
    assert "teacher.array may name one of labels, clip_embeddings" in refusal(path)


# --- safetensors ---


def tensors(path, metadata=None, **changes):
    """A file of tensors with some of them replaced, or left out where None."""
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is absent")
    arrays = {"logits": np.zeros((3, 2), np.float32), "sha256": np.zeros((3, 32), np.uint8)}
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    given = {"label_names": '["x", "y"]', "fingerprint": "f"} | (metadata or {})
    numpy.save_file(arrays, path, {k: v for k, v in given.items() if v is not None})
    return path


def test_tensors_of_others_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    hashes = np.arange(96, dtype=np.uint8).reshape(3, 32)
    half = np.ones((3, 2), np.float16)
    loaded = load_answers(tensors(path, logits=half, sha256=hashes))
    assert loaded.logits.dtype == np.float32 and loaded.logits.sum() == 6
    assert loaded.sha256[1] == bytes(range(32, 64)).hex()
    assert loaded[2:4] == (("x", "y"), "f")
    nameless = {"label_names": None}
    loaded = load_answers(tensors(path, nameless, logits=None, embeddings=np.ones((3, 5))))
    assert loaded.logits.shape == (3, 5) and loaded.label_names == ()
    tensors(path, nameless, logits=None, pooled=np.ones((3, 5)))
    assert load_answers(path, "pooled").logits.shape == (3, 5)


@pytest.mark.parametrize(
    ("metadata", "changes", "words"),
    [
        ({}, {"logits": None}, "lacks the array 'logits'"),
        ({}, {"sha256": None}, "lacks the tensor 'sha256'"),
        ({}, {"sha256": np.zeros((3, 64), np.uint8)}, "must be uint8 [M, 32], got uint8 [3, 64]"),
        ({}, {"sha256": np.zeros((3, 32), np.int8)}, "must be uint8 [M, 32], got int8"),
        ({}, {"sha256": np.zeros((2, 32), np.uint8)}, "one sha256 per row"),
        ({}, {"logits": np.zeros((3, 2), int)}, "must be floats [M, F]"),
        ({}, {"logits": np.full((3, 2), np.nan, np.float32)}, "must be finite; 3 rows"),
        ({"label_names": None}, {}, "must hold label_names, a JSON list of strings"),
        ({"label_names": "x, y"}, {}, "must hold label_names, a JSON list of strings"),
        ({"label_names": "[1, 2]"}, {}, "must hold label_names, a JSON list of strings"),
        ({"label_names": '["x"]'}, {}, "one label name per column"),
        ({"fingerprint": None}, {}, "must hold fingerprint, a string"),
    ],
)
def test_what_is_wrong_with_tensors_is_told(tmp_path, metadata, changes, words):
    assert words in refusal(tensors(tmp_path / "a.safetensors", metadata, **changes))


def test_tensors_of_a_type_that_numpy_lacks(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors(path)
    header = (
        b'{"logits":{"dtype":"F8_E4M3","shape":[1,2],"data_offsets":[0,2]},'
        b'"sha256":{"dtype":"U8","shape":[1,32],"data_offsets":[2,34]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(34))
    refusal(path)


def test_safetensors_may_be_absent(tmp_path, answers, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    words = "needs the package safetensors; pip install safetensors"
    assert words in refusal(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words):
        save_answers(tmp_path / "a.safetensors", answers)


# --- a bare array and a text file ---


def test_a_bare_array_names_no_other(tmp_path, answers):
    save_answers(tmp_path / "a.npy", answers)
    with pytest.raises(UserError, match="^teacher.array must not be set for .*a.npy"):
        load_answers(tmp_path / "a.npy", "logits")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, "must hold sha256, label_names and fingerprint"),
        ({"sha256": None}, "must hold sha256, a JSON list of strings"),
        ({"sha256": "abc"}, "must hold sha256, a JSON list of strings"),
        ({"sha256": ["a", "b"]}, "one sha256 per row"),
        ({"label_names": [1, 2]}, "must hold label_names, a JSON list of strings"),
        ({"label_names": ["x"]}, "one label name per column"),
        ({"fingerprint": 3}, "must hold fingerprint, a string"),
    ],
)
def test_what_is_wrong_beside_an_array_is_told(tmp_path, changes, words):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((3, 2), np.float32))
    rest = {"sha256": ["a", "b", "c"], "label_names": ["x", "y"], "fingerprint": "f"}
    content = [] if changes is None else rest | changes
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert words in refusal(path)


def test_an_array_needs_its_text_file(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((3, 2), np.float32))
    assert f"there is no file {tmp_path / 'a.json'} beside {path}; it must" in refusal(path)
    (tmp_path / "a.json").write_bytes(b"\xff{")
    assert "is no readable JSON file" in refusal(path)


def test_a_bare_array_is_no_pickle_and_no_archive(tmp_path, answers):
    path = tmp_path / "a.npy"
    save_answers(path, answers)
    np.save(path, np.array([[{}]] * COUNT, object))
    assert "is no readable .npy file" in refusal(path)
    with path.open("wb") as file:
        np.savez(file, logits=answers.logits)
    assert "is no readable .npy file (several arrays)" in refusal(path)


# --- joined to images ---


def test_answers_find_their_images_by_hash(public, answers):
    """In whatever order the file holds them, among answers to other images."""
    order = np.random.default_rng(1).permutation(COUNT)
    more = Answers(
        logits=np.concatenate([np.full((2, CLASSES), 9.0, np.float32), answers.logits[order]]),
        sha256=("0" * 64, "1" * 64, *(answers.sha256[i] for i in order)),
        label_names=answers.label_names,
        fingerprint=answers.fingerprint,
    )
    np.testing.assert_array_equal(join_answers(more, public), answers.logits)


def test_an_image_shown_twice_gets_one_answer_twice(public, answers):
    twice = public._replace(
        images=public.images[[0, 3, 0]], sha256=tuple(public.sha256[i] for i in (0, 3, 0))
    )
    np.testing.assert_array_equal(join_answers(answers, twice), answers.logits[[0, 3, 0]])


def test_images_without_an_answer_are_counted(public, answers):
    fewer = answers._replace(logits=answers.logits[:-2], sha256=answers.sha256[:-2])
    words = f"2 of the 10 images of tiny_public have no answer.*{public.sha256[-2]}.*must answer"
    with pytest.raises(UserError, match=f"^teacher.path: {words}"):
        join_answers(fewer, public)


# --- simulated ---


def test_a_simulated_teacher_is_as_often_right_as_asked():
    public = tiny_public(2000)
    for accuracy in (0.3, 0.85, 1.0):
        answers = simulated(public, accuracy)
        assert answers.logits.shape == (2000, PUBLIC_CLASSES)
        hits = np.mean(answers.logits.argmax(axis=1) == public.labels)
        spread = (accuracy * (1 - accuracy) / 2000) ** 0.5
        assert abs(hits - accuracy) <= 4 * spread


def test_a_simulated_answer_depends_on_the_image_alone(public):
    answers = simulated(public, 0.85)
    np.testing.assert_array_equal(simulated(public, 0.85).logits, answers.logits)
    order = np.random.default_rng(2).permutation(COUNT)[:6]
    some = public._replace(
        images=public.images[order],
        labels=public.labels[order],
        sha256=tuple(public.sha256[i] for i in order),
    )
    again = simulated(some, 0.85)
    np.testing.assert_array_equal(again.logits, answers.logits[order])
    np.testing.assert_array_equal(join_answers(answers, some), again.logits)
    assert len(np.unique(answers.logits, axis=0)) == COUNT


def test_a_simulated_teacher_says_so(public):
    answers = simulated(public, 0.85)
    assert answers.fingerprint == "simulated (accuracy 0.85)"
    assert answers.label_names == public.label_names
    assert answers.sha256 == public.sha256


def test_a_simulated_teacher_of_one_class_has_nothing_to_get_wrong(public):
    one = public._replace(labels=np.zeros(COUNT, np.int32), label_names=("only",))
    assert simulated(one, 0.1).logits.shape == (COUNT, 1)


def test_a_simulated_teacher_needs_labels(public):
    with pytest.raises(
        UserError, match="^teacher.name: .*tiny_public has none; use stored answers"
    ):
        simulated(public._replace(labels=None, label_names=None), 0.85)
