import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest
from helpers import refusal
from scipy.special import softmax

from fedhelp_jax.teachers import store as store_lib
from fedhelp_jax.teachers.base import Fingerprint
from fedhelp_jax.teachers.store import AnswerStore, Precision, decode, encode

CLASSES = 9
NAMES = tuple(f"class {i}" for i in range(CLASSES))
FINGERPRINT = Fingerprint("tiny", "version 1", "native size", NAMES)
SHAPES = [(CLASSES,), (3, 4, CLASSES)]
FLOAT32, FLOAT16 = Precision(), Precision("float16")
NOBODY = 65534


def logits(*shape, seed=0):
    return (4 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def sha(number):
    return f"{number:064x}"


def shas(count):
    return [sha(number) for number in range(count)]


def opened(folder, precision=FLOAT32, *, write=False, fingerprint=FINGERPRINT):
    return AnswerStore(folder, fingerprint, precision, write=write)


def filled(folder, answers, precision=FLOAT32, fingerprint=FINGERPRINT):
    """A store of answers about the images 0, 1, ..."""
    with opened(folder, precision, write=True, fingerprint=fingerprint) as store:
        store.put(shas(len(answers)), answers)
    return folder


def divergence(before, after):
    """``KL(softmax(before) || softmax(after))`` in float64, averaged over pixels."""
    p, q = softmax(before.astype(np.float64), axis=-1), softmax(after.astype(np.float64), axis=-1)
    return np.mean(np.sum(p * np.log(p / q), axis=-1))


# --- records ---


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_comes_back_bit_by_bit(shape):
    answer = logits(*shape)
    answer.flat[:4] = [-0.0, 1e-45, np.finfo(np.float32).max, -np.finfo(np.float32).max]
    stored = decode(encode(answer, FLOAT32))
    assert stored.answer.dtype == np.float32 and stored.answer.shape == shape
    assert stored.answer.tobytes() == answer.tobytes()
    assert stored.precision == FLOAT32
    assert stored.truncation_kl == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_float16_comes_back_rounded(shape):
    answer = logits(*shape)
    record = encode(answer, FLOAT16)
    stored = decode(record)
    assert stored.answer.dtype == np.float32
    np.testing.assert_array_equal(stored.answer, answer.astype(np.float16).astype(np.float32))
    assert stored.precision == FLOAT16
    assert len(encode(answer, FLOAT32)) - len(record) == 2 * answer.size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("top_k", [1, 3, CLASSES - 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_are_kept_and_the_rest_share_evenly(shape, top_k, dtype):
    answer = logits(*shape)
    stored = decode(encode(answer, Precision(dtype, top_k)))
    assert stored.precision == Precision(dtype, top_k)
    assert stored.answer.dtype == np.float32 and stored.answer.shape == shape
    before = softmax(answer.astype(np.float64), axis=-1).reshape(-1, CLASSES)
    got = stored.answer.reshape(-1, CLASSES)
    after = softmax(got.astype(np.float64), axis=-1)
    for row in range(len(before)):
        order = np.argsort(-before[row])
        kept, rest = order[:top_k], order[top_k:]
        expected = answer.reshape(-1, CLASSES)[row, kept].astype(dtype)
        np.testing.assert_array_equal(got[row, kept], expected.astype(np.float32))
        assert len(set(got[row, rest].tolist())) == 1
        # Rounded logits of float16, up to 16 here, are off by 2^-8 at most.
        tolerance = 1e-6 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(after[row, kept], before[row, kept], rtol=tolerance)
        share = before[row, rest].sum()
        np.testing.assert_allclose(after[row, rest], share / len(rest), rtol=tolerance)


@pytest.mark.parametrize("precision", [Precision("float32", 4), Precision("float16", 2), FLOAT16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_lost_is_told_in_nats(shape, precision):
    answer = logits(*shape)
    stored = decode(encode(answer, precision))
    expected = divergence(answer, stored.answer)
    assert expected > 0
    # As a float32, of differences between numbers near 1.
    assert stored.truncation_kl == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_nothing_is_lost_where_the_rest_is_even():
    answer = np.full(CLASSES, -1.5, np.float32)
    answer[2] = 3.0
    stored = decode(encode(answer, Precision("float32", 1)))
    np.testing.assert_allclose(stored.answer, answer, rtol=0, atol=1e-6)
    assert abs(stored.truncation_kl) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ties_break_by_class_index(dtype):
    answer = np.array([[1, 7, 2, 7, 7, 0], [5, 5, 5, 5, 5, 5]], np.float32)
    stored = decode(encode(answer, Precision(dtype, 2))).answer
    kept = [[1, 3], [0, 1]]
    for row, columns in enumerate(kept):
        np.testing.assert_array_equal(stored[row, columns], answer[row, columns])
    assert len(set(stored[0, [0, 2, 4, 5]].tolist())) == 1
    share = np.exp([1.0, 2.0, 7.0, 0.0]).sum() / 4
    np.testing.assert_allclose(stored[0, 4], np.log(share), rtol=1e-6)
    # Of many, which an unstable sort would leave in another order.
    many = np.repeat(np.array([1, 8, 1], np.float32), 100)
    stored = decode(encode(many, Precision(dtype, 50))).answer
    np.testing.assert_array_equal(np.flatnonzero(stored == 8), np.arange(100, 150))


@pytest.mark.parametrize("top_k", [CLASSES, CLASSES + 1, 10**6])
def test_as_many_as_there_are_is_all(top_k):
    answer = logits(CLASSES)
    assert encode(answer, Precision("float32", top_k)) == encode(answer, FLOAT32)


def test_extreme_logits_keep_their_probabilities():
    answer = np.array([3e38, 0, -3e38, 1e4], np.float32)
    stored = decode(encode(answer, Precision("float32", 1)))
    assert np.isfinite(stored.answer).all() and np.isfinite(stored.truncation_kl)
    np.testing.assert_array_equal(softmax(stored.answer.astype(np.float64)), [1, 0, 0, 0])


def test_what_float16_cannot_hold_is_refused():
    answer = logits(CLASSES)
    answer[3] = 65504
    assert decode(encode(answer, FLOAT16)).answer[3] == 65504
    for large in (65536, -65536, 1e30):
        answer[3] = large
        for precision in (FLOAT16, Precision("float16", 2)):
            message = refusal(lambda p=precision: encode(answer, p))
            assert message.startswith("teacher.dtype: ") and message.endswith("use float32")
        assert decode(encode(answer, FLOAT32)).answer[3] == np.float32(large)


@pytest.mark.parametrize(
    ("kept", "serves"),
    [
        (FLOAT32, {FLOAT32, FLOAT16, Precision("float32", 4), Precision("float16", 4)}),
        (FLOAT16, {FLOAT16, Precision("float16", 4)}),
        (Precision("float32", 4), {Precision("float32", 4), Precision("float16", 4)}),
        (Precision("float16", 4), {Precision("float16", 4)}),
        (Precision("float32", 3), set()),
    ],
)
def test_more_covers_less(kept, serves):
    asked = {FLOAT32, FLOAT16, Precision("float32", 4), Precision("float16", 4)}
    assert {precision for precision in asked if kept.covers(precision)} == serves


# --- what the store gives back ---


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_come_back_by_image(tmp_path, shape):
    answers = logits(5, *shape)
    folder = filled(tmp_path / "deep" / "store", answers)
    with opened(folder) as store:
        found = store.read([sha(3), sha(77), sha(0)])
        assert set(found) == {sha(3), sha(0)}
        for number in (3, 0):
            assert found[sha(number)].answer.tobytes() == answers[number].tobytes()
        assert store.known([*shas(5), sha(77)]) == set(shas(5))


def test_an_answer_outlives_the_store_it_was_read_from(tmp_path):
    answers = logits(1, CLASSES)
    with opened(filled(tmp_path, answers)) as store:
        found = store.read(shas(1))[sha(0)]
    filled(tmp_path, logits(1, CLASSES, seed=1))
    np.testing.assert_array_equal(found.answer, answers[0])
    found.answer[:] = 0  # and is the reader's own


@pytest.mark.parametrize("asked", [FLOAT32, FLOAT16, Precision("float32", 4)])
@pytest.mark.parametrize("kept", [FLOAT32, FLOAT16, Precision("float32", 4)])
def test_what_is_lost_is_that_of_what_is_read(tmp_path, kept, asked):
    """Also where more was stored than is asked for: training sees no more than that."""
    with opened(filled(tmp_path, logits(3, CLASSES), kept), asked) as store:
        found = store.read(shas(4))
        lost = store.truncation_kl(shas(4))
    assert lost == {key: stored.truncation_kl for key, stored in found.items()}


LESS = [FLOAT16, Precision("float32", 4), Precision("float16", 4), Precision("float16", 1)]


@pytest.mark.parametrize("asked", LESS)
@pytest.mark.parametrize("shape", SHAPES)
def test_more_precision_gives_what_storing_less_would_have_given(tmp_path, shape, asked):
    answers = logits(3, *shape)
    much, little = filled(tmp_path / "a", answers), filled(tmp_path / "b", answers, asked)
    with opened(much, asked) as store:
        reduced = store.read(shas(3))
    with opened(little, asked) as store:
        expected = store.read(shas(3))
    assert len(reduced) == len(expected) == 3
    for key, stored in expected.items():
        assert reduced[key].answer.tobytes() == stored.answer.tobytes()
        assert reduced[key].precision == stored.precision == asked
        assert reduced[key].truncation_kl == stored.truncation_kl > 0


@pytest.mark.parametrize("kept", [Precision("float32", 6), Precision("float16", 6)])
def test_of_more_logits_fewer_are_given(tmp_path, kept):
    """The same but for rounding; what is lost then adds up to what is lost in all."""
    answers, asked = logits(3, CLASSES), Precision(kept.dtype, 2)
    much, little = filled(tmp_path / "a", answers, kept), filled(tmp_path / "b", answers, asked)
    with opened(much, asked) as store:
        reduced = store.read(shas(3))
    with opened(little, asked) as store:
        expected = store.read(shas(3))
    tolerance = 1e-6 if kept.dtype == "float32" else 2**-7
    for key, stored in expected.items():
        places = np.argsort(-stored.answer)[:2]
        np.testing.assert_array_equal(reduced[key].answer[places], stored.answer[places])
        np.testing.assert_allclose(reduced[key].answer, stored.answer, rtol=0, atol=tolerance)
        assert reduced[key].precision == asked
        assert reduced[key].truncation_kl == pytest.approx(stored.truncation_kl, rel=10 * tolerance)


@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        (FLOAT16, FLOAT32),
        (FLOAT16, Precision("float32", 2)),
        (Precision("float32", 4), FLOAT32),
        (Precision("float32", 4), FLOAT16),
        (Precision("float32", 4), Precision("float32", 5)),
        (Precision("float16", 4), Precision("float32", 3)),
    ],
)
def test_less_precision_is_asked_anew(tmp_path, kept, asked):
    answers = logits(3, CLASSES)
    folder = filled(tmp_path, answers, kept)
    with opened(folder, asked) as store:
        assert store.read(shas(3)) == {} and store.known(shas(3)) == set()
    with opened(folder, asked, write=True) as store:
        store.put([sha(1)], answers[1:2])
    with opened(folder, asked) as store:
        found = store.read(shas(3))
        assert set(found) == {sha(1)}
        assert found[sha(1)].answer.tobytes() == decode(encode(answers[1], asked)).answer.tobytes()
    # What replaced it serves whoever needs less just as well.
    if asked.covers(kept):
        with opened(folder, kept) as store:
            assert store.known(shas(3)) == set(shas(3))


@pytest.mark.parametrize("field", ["name", "version", "preprocessing", "label_names"])
def test_answers_belong_to_one_model(tmp_path, field):
    changed = NAMES[::-1] if field == "label_names" else "another"
    other = FINGERPRINT._replace(**{field: changed})
    filled(tmp_path, logits(3, CLASSES))
    with opened(tmp_path, fingerprint=other, write=True) as store:
        assert store.read(shas(3)) == {}
        store.consume_quota(7, None)
        store.put([sha(0)], logits(1, 2, 2, CLASSES))  # of another shape too
    with opened(tmp_path) as store:
        assert store.known(shas(3)) == set(shas(3)) and store.sent == 0
        np.testing.assert_array_equal(store.read(shas(1))[sha(0)].answer, logits(3, CLASSES)[0])


# --- writing ---


def test_all_of_a_batch_is_stored_or_none(tmp_path):
    answers = logits(3, CLASSES)
    answers[2, 4] = 1e6
    with opened(tmp_path, FLOAT16, write=True) as store:
        refusal(lambda: store.put(shas(3), answers))
        assert store.read(shas(3)) == {}
        with pytest.raises(ValueError):
            store.put(shas(3), answers[:2])
        assert store.read(shas(3)) == {}
        # Nor is it known by now what shape its answers have.
        store.put(shas(2), logits(2, 4, 4, CLASSES))
        assert store.known(shas(3)) == set(shas(2))


@pytest.mark.parametrize("shape", [(CLASSES + 1,), (2, CLASSES), (3, CLASSES, 1)])
def test_another_shape_is_another_model(tmp_path, shape):
    answers = logits(2, CLASSES)
    filled(tmp_path, answers)
    with opened(tmp_path, write=True) as store:
        message = refusal(lambda: store.put([sha(1), sha(2)], logits(2, *shape)))
        assert message.startswith(f"teacher: tiny answered {list(shape)}, but [{CLASSES}] before")
        assert "teacher.version" in message
        found = store.read(shas(3))
    assert set(found) == set(shas(2))
    np.testing.assert_array_equal(found[sha(1)].answer, answers[1])


def test_what_is_sent_is_counted_over_all_runs(tmp_path):
    with opened(tmp_path, write=True) as store:
        assert store.sent == 0
        store.consume_quota(3, None)
        store.consume_quota(4, 7)
        assert store.sent == 7
    with opened(tmp_path) as store:
        assert store.sent == 7
    with opened(tmp_path, write=True) as store:
        for images, limit in ((1, 7), (4, 10), (1, 0)):
            message = refusal(lambda i=images, n=limit: store.consume_quota(i, n))
            assert f"teacher.max_queries = {limit}" in message
            assert "7 images were sent to tiny" in message
        assert store.sent == 7
        store.consume_quota(3, 10)
        assert store.sent == 10


def test_threads_may_write_at_once(tmp_path, monkeypatch):
    """Into a file that has to grow meanwhile."""
    monkeypatch.setattr(store_lib, "_FREE_BYTES", 2**16)
    threads, batches = 4, 12
    answers = logits(threads, batches, 2, 500)
    errors = []
    with opened(tmp_path, write=True) as store:

        def write(thread):
            try:
                for batch in range(batches):
                    store.consume_quota(2, None)
                    numbers = 2 * (thread * batches + batch) + np.arange(2)
                    store.put([sha(n) for n in numbers.tolist()], answers[thread, batch])
            except BaseException as error:
                errors.append(error)

        running = [threading.Thread(target=write, args=(n,)) for n in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(30)
        assert not errors
        assert store.sent == threads * batches * 2
        found = store.read(shas(threads * batches * 2))
    flat = answers.reshape(-1, 500)
    for number in range(len(flat)):
        np.testing.assert_array_equal(found[sha(number)].answer, flat[number])


def test_a_store_grows_beyond_its_first_size(tmp_path, monkeypatch):
    monkeypatch.setattr(store_lib, "_FREE_BYTES", 2**16)
    answers = logits(8, 60, 30_000 // 60)
    with opened(tmp_path, write=True) as store:
        for number, answer in enumerate(answers):
            store.put([sha(number)], answer[None])
        assert set(store.known(shas(8))) == set(shas(8))
    assert (tmp_path / "data.mdb").stat().st_size > 8 * 30_000 * 4
    with opened(tmp_path) as store:
        found = store.read(shas(8))
    for number, answer in enumerate(answers):
        np.testing.assert_array_equal(found[sha(number)].answer, answer)


def test_only_one_at_a_time_asks_a_model(tmp_path):
    waits, order = threading.Event(), []
    other = FINGERPRINT._replace(version="2")

    def second():
        with opened(tmp_path).exclusive_lock(waits.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with opened(tmp_path).exclusive_lock(lambda: order.append("waited")):
        with opened(tmp_path, fingerprint=other).exclusive_lock(lambda: order.append("waited")):
            thread.start()
            assert waits.wait(10)
            order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


# --- another process ---

_WRITER = """\
import sys
from pathlib import Path
import numpy as np
from fedhelp_jax.teachers import store
from fedhelp_jax.teachers.base import Fingerprint
folder, free, first, last, *fingerprint = sys.argv[1:]
store._FREE_BYTES = int(free)
names = tuple(fingerprint[3].split("|"))
with store.AnswerStore(
    Path(folder), Fingerprint(*fingerprint[:3], names), store.Precision(), write=True
) as opened:
    for number in range(int(first), int(last)):
        opened.put([f"{number:064x}"], np.full((1, len(names)), number, np.float32))
        opened.consume_quota(1, None)
"""


def write_elsewhere(folder, first, last, fingerprint=FINGERPRINT, free=2**16):
    """Has another process store answers about some images: all logits the image's number."""
    *words, names = fingerprint
    arguments = [str(folder), str(free), str(first), str(last), *words, "|".join(names)]
    command = [sys.executable, "-c", _WRITER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def assert_numbers(found, numbers):
    assert set(found) == {sha(number) for number in numbers}
    for number in numbers:
        assert (found[sha(number)].answer == number).all()


def test_what_another_process_writes_is_read_while_open(tmp_path):
    filled(tmp_path, np.zeros((1, CLASSES), np.float32))
    with opened(tmp_path) as store:
        assert_numbers(store.read(shas(4)), [0])
        write_elsewhere(tmp_path, 1, 3)
        assert_numbers(store.read(shas(4)), [0, 1, 2])
        assert store.sent == 2


# Of so many classes that 40 answers are more than the map of whoever opened the store before.
WIDE = FINGERPRINT._replace(label_names=tuple("c" for _ in range(2000)))


def test_a_writer_follows_what_another_process_has_made_larger(tmp_path, monkeypatch):
    monkeypatch.setattr(store_lib, "_FREE_BYTES", 2**16)
    filled(tmp_path, np.zeros((1, 2000), np.float32), fingerprint=WIDE)
    with opened(tmp_path, fingerprint=WIDE, write=True) as store:
        write_elsewhere(tmp_path, 1, 40, WIDE)
        store.put([sha(40)], np.full((1, 2000), 40, np.float32))
        store.consume_quota(1, None)
        assert_numbers(store.read(shas(41)), range(41))
        assert store.sent == 40


@pytest.mark.slow
def test_a_reader_follows_what_another_process_has_made_larger(tmp_path, monkeypatch):
    monkeypatch.setattr(store_lib, "_FREE_BYTES", 2**16)
    filled(tmp_path, np.zeros((1, 2000), np.float32), fingerprint=WIDE)
    with opened(tmp_path, fingerprint=WIDE) as store:
        write_elsewhere(tmp_path, 1, 40, WIDE)
        assert_numbers(store.read(shas(40)), range(40))
        assert store.sent == 39


# --- folders that are none, or not ours to write to ---


def test_reading_where_there_is_no_store_makes_none(tmp_path):
    for folder in (tmp_path / "absent", tmp_path, tmp_path / "file"):
        (tmp_path / "file").touch()
        before = sorted(tmp_path.rglob("*"))
        with opened(folder) as store:
            assert store.read(shas(2)) == {} and store.known(shas(2)) == set()
            assert store.sent == 0
        assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def unprivileged(tmp_path, monkeypatch):
    """What makes us somebody who may read the files in ``tmp_path``, and write where all may."""
    monkeypatch.chdir(tmp_path)  # by relative paths, as the folders above may be closed to others
    tmp_path.chmod(0o755)

    @contextlib.contextmanager
    def without_rights():
        if os.geteuid() != 0:
            yield
            return
        os.setresuid(NOBODY, NOBODY, 0)
        try:
            yield
        finally:
            os.setresuid(0, 0, 0)

    return without_rights


def close_to_writers(folder, mode=0o444):
    for file in folder.iterdir():
        file.chmod(mode)
    folder.chmod(0o555)


def test_a_read_only_folder_can_be_read(tmp_path, unprivileged):
    answers = logits(3, CLASSES)
    folder = filled(Path("store"), answers)
    close_to_writers(folder)
    before = sorted(folder.iterdir())
    with unprivileged():
        with pytest.raises(OSError):
            (folder / "new").touch()
        with opened(folder) as store:
            found = store.read(shas(4))
    assert sorted(folder.iterdir()) == before
    assert set(found) == set(shas(3))
    np.testing.assert_array_equal(found[sha(2)].answer, answers[2])


@pytest.mark.parametrize("mode", [0o444, 0o666], ids=["closed files", "open files"])
def test_a_read_only_folder_cannot_be_written_to(unprivileged, mode):
    """Not even where its files can: who writes needs locks, whose files are made there."""
    folder = filled(Path("store"), logits(3, CLASSES))
    close_to_writers(folder, mode)

    def write():
        with opened(folder, write=True) as store, store.exclusive_lock(lambda: None):
            store.put([sha(3)], logits(1, CLASSES))

    with unprivileged():
        message = refusal(write)
    assert message.startswith("teacher.store: store") and "cannot be" in message


def test_a_store_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        message = refusal(lambda folder=folder: opened(folder, write=True))
        assert message.startswith(f"teacher.store: {folder} cannot be used (")


# --- files that are damaged or others' ---


def test_records_of_another_version_are_refused(tmp_path):
    filled(tmp_path, logits(2, CLASSES))
    with lmdb.open(str(tmp_path)) as environment, environment.begin(write=True) as transaction:
        for key, record in list(transaction.cursor()):
            if key.startswith(b"a"):
                transaction.put(key, b"\2" + record[1:])
    with opened(tmp_path) as store:
        for do in (store.read, store.known):
            message = refusal(lambda do=do: do(shas(2)))
            assert message == "teacher.store: holds records of version 2, this reads 1"


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("content", [b"no database\n", b"\0" * 8192, bytes(range(256)) * 64])
def test_a_file_that_is_no_database_is_refused(tmp_path, content, write):
    (tmp_path / "data.mdb").write_bytes(content)
    message = refusal(lambda: opened(tmp_path, write=write))
    assert message.startswith(f"teacher.store: {tmp_path} cannot be used (")
    assert (tmp_path / "data.mdb").read_bytes() == content


_READER = """\
import sys
from pathlib import Path
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.base import Fingerprint
from fedhelp_jax.teachers.store import AnswerStore, Precision
fingerprint = Fingerprint("tiny", "1", "none", ())
try:
    with AnswerStore(Path(sys.argv[1]), fingerprint, Precision()) as store:
        store.read([f"{number:064x}" for number in range(200)])
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("count", "cut"),
    [(200, 0.5), (5, 0.5), (200, 0.2)],
    ids=["half of many", "half of a few", "most of many"],
)
def test_a_store_that_was_copied_in_part_is_refused(tmp_path, count, cut):
    """In a process of its own, which reading past the end of a file would kill."""
    fingerprint = Fingerprint("tiny", "1", "none", ())
    filled(tmp_path, logits(count, 100), fingerprint=fingerprint)
    file = tmp_path / "data.mdb"
    os.truncate(file, round((1 - cut) * file.stat().st_size))
    command = [sys.executable, "-c", _READER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, (done.returncode, done.stderr)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"teacher.store: {tmp_path} cannot be used (")
