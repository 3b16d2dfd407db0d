import math

import numpy as np
import pytest
from helpers import PUBLIC_CLASSES, tiny_public

from fedhelp_jax.errors import UserError
from fedhelp_jax.teachers.answers import Answers, join_answers, load_answers, save_answers
from fedhelp_jax.teachers.simulated import simulate_answers

COUNT, CLASSES = 10, 7


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


def refusal(path):
    with pytest.raises(UserError) as error:
        load_answers(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("teacher.path: ") and str(path) in message
    return message


# --- files ---


def test_a_file_gives_back_what_was_saved(tmp_path, answers):
    save_answers(tmp_path / "a.npz", answers)
    loaded = load_answers(tmp_path / "a.npz")
    assert loaded.logits.dtype == np.float32
    np.testing.assert_array_equal(loaded.logits, answers.logits)
    assert loaded[1:] == answers[1:]


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
    assert loaded[1:] == (("a", "b", "c"), ("x", "y"), "f")


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


@pytest.mark.parametrize("content", [b"", b"logits,sha256\n", b"PK\x03\x04 cut off"])
def test_files_that_are_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    assert "is no readable .npz file" in refusal(tmp_path / "a.npz")


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


def test_a_missing_file_is_named(tmp_path):
    assert "there is no file" in refusal(tmp_path / "a.npz")


def test_a_single_array_is_no_file_of_answers(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
    refusal(tmp_path / "a.npy")


def test_a_folder_is_no_file_of_answers(tmp_path):
    refusal(tmp_path)


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
        answers = simulate_answers(public, accuracy)
        assert answers.logits.shape == (2000, PUBLIC_CLASSES)
        hits = np.mean(answers.logits.argmax(axis=1) == public.labels)
        spread = (accuracy * (1 - accuracy) / 2000) ** 0.5
        assert abs(hits - accuracy) <= 4 * spread


def test_a_simulated_answer_depends_on_the_image_alone(public):
    answers = simulate_answers(public, 0.85)
    np.testing.assert_array_equal(simulate_answers(public, 0.85).logits, answers.logits)
    order = np.random.default_rng(2).permutation(COUNT)[:6]
    some = public._replace(
        images=public.images[order],
        labels=public.labels[order],
        sha256=tuple(public.sha256[i] for i in order),
    )
    again = simulate_answers(some, 0.85)
    np.testing.assert_array_equal(again.logits, answers.logits[order])
    np.testing.assert_array_equal(join_answers(answers, some), again.logits)
    assert len(np.unique(answers.logits, axis=0)) == COUNT


def test_a_simulated_teacher_says_so(public):
    answers = simulate_answers(public, 0.85)
    assert answers.fingerprint == "simulated (accuracy 0.85)"
    assert answers.label_names == public.label_names
    assert answers.sha256 == public.sha256


def test_a_simulated_teacher_of_one_class_has_nothing_to_get_wrong(public):
    one = public._replace(labels=np.zeros(COUNT, np.int32), label_names=("only",))
    assert simulate_answers(one, 0.1).logits.shape == (COUNT, 1)


def test_a_simulated_teacher_needs_labels(public):
    with pytest.raises(
        UserError, match="^teacher.name: .*tiny_public has none; use stored answers"
    ):
        simulate_answers(public._replace(labels=None, label_names=None), 0.85)
