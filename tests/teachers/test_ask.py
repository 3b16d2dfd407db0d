import random
import threading
import time

import numpy as np
import pytest
from fake_model import FakeModel
from helpers import public_images, refusal, tiny_public

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers import query
from fedhelp_jax.teachers.base import TransientError
from fedhelp_jax.teachers.query import QueryLimits, execute, make_plan
from fedhelp_jax.teachers.store import AnswerStore, Precision

COUNT, BATCH = 22, 4
PACE = QueryLimits(
    batch_size=BATCH,
    concurrency=1,
    requests_per_second=None,
    max_attempts=3,
    max_backoff=1.0,
    max_queries=None,
)


@pytest.fixture(scope="module")
def images():
    return public_images(tiny_public(COUNT).originals)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(query, "_FIRST_PAUSE", 0.001)


class Asking:
    """A model, a store of its answers, and what was told while it was asked."""

    def __init__(self, folder, images, model, pace, on_answers=lambda count: None):
        self.folder, self.images, self.model, self.pace = folder, images, model, pace
        self.told, self._on_answers = [], on_answers

    def store(self, *, write=False):
        return AnswerStore(self.folder, self.model.fingerprint, Precision(), write=write)

    def plan(self):
        with self.store() as store:
            return make_plan(self.model, self.images, store, self.pace)

    def ask(self):
        plan = self.plan()
        with self.store(write=True) as store:

            def told(count):
                self.told.append(count)
                stored = len(store.known(self.images.sha256))
                assert stored == plan.known + sum(self.told), "told before it was stored"
                # No more is paid for than could be lost.
                begun = plan.known + len(self.model.received)
                assert begun - stored <= self.pace.concurrency * self.pace.batch_size
                self._on_answers(count)

            execute(plan, self.model, self.images, store, self.pace, told)

    def stored(self):
        """The images with an answer, once each answer is known to be right."""
        with self.store() as store:
            found = store.read(self.images.sha256)
        for sha, stored in found.items():
            np.testing.assert_array_equal(stored.answer, self.model.expected(sha))
        return set(found)

    @property
    def sent(self):
        with self.store() as store:
            return store.sent


@pytest.fixture
def asking(tmp_path, images):
    """Makes an `Asking`; what is not said of the pace is as in `PACE`."""

    def make(model=None, on_answers=lambda count: None, images=images, **pace):
        model = model or FakeModel()
        return Asking(tmp_path / "store", images, model, PACE._replace(**pace), on_answers)

    return make


# --- plans ---


def mixed_images():
    """Images of four shapes, in turns; the last is the first once more."""
    rng = np.random.default_rng(0)
    shapes = [(8, 8, 3), (6, 9, 3), (8, 8), (8, 8, 1)]
    arrays = [rng.integers(0, 256, shapes[n % 4], dtype=np.uint8) for n in range(26)]
    return public_images([*arrays, arrays[0]])


def test_batches_are_of_one_shape(asking):
    images = mixed_images()
    plan = asking(images=images).plan()
    assert plan.images == 26 and plan.known == 0 and plan.to_ask == 26 and plan.sent_before == 0
    assert sorted(place for batch in plan.batches for place in batch) == list(range(26))
    assert {len({images.shapes[place] for place in batch}) for batch in plan.batches} == {1}
    # 7, 7, 6 and 6 images of each shape.
    assert sorted(map(len, plan.batches)) == [2, 2, 3, 3, 4, 4, 4, 4]
    assert all(list(batch) == sorted(batch) for batch in plan.batches)


def test_a_model_may_take_fewer_at_once(asking):
    for limit, size in ((1, 1), (3, 3), (100, BATCH), (None, BATCH)):
        plan = asking(FakeModel(batch_limit=limit)).plan()
        assert [len(batch) for batch in plan.batches[:-1]] == [size] * ((COUNT - 1) // size)


def test_a_plan_asks_nothing_and_writes_nothing(asking):
    one = asking()
    one.plan()
    assert one.model.asked == [] and not one.folder.exists()


def test_what_is_known_is_not_asked(asking):
    one = asking()
    places = [0, 5, 6, 21]
    with one.store(write=True) as store:
        sha256 = [one.images.sha256[place] for place in places]
        store.put(sha256, np.stack([one.model.expected(sha) for sha in sha256]))
        store.consume_quota(9, None)
    plan = one.plan()
    assert (plan.images, plan.known, plan.to_ask, plan.sent_before) == (COUNT, 4, COUNT - 4, 9)
    planned = {place for batch in plan.batches for place in batch}
    assert planned == set(range(COUNT)) - set(places)
    assert [len(batch) for batch in plan.batches] == [4, 4, 4, 4, 2]
    one.ask()
    assert set(one.model.received) == {one.images.sha256[place] for place in planned}
    plan = one.plan()
    assert plan.batches == () and plan.to_ask == 0 and plan.bytes_out == 0
    one.ask()  # which is nothing
    assert len(one.model.asked) == 5


def test_what_will_be_sent_is_judged_by_the_first_request(asking):
    model = FakeModel(bytes_an_image=50)
    assert asking(model).plan().bytes_out == round((100 + 50 * BATCH) / BATCH * COUNT)
    assert asking(model, batch_size=1).plan().bytes_out == 150 * COUNT
    assert asking(model, batch_size=COUNT).plan().bytes_out == 100 + 50 * COUNT
    assert asking(FakeModel()).plan().bytes_out == 0  # it runs here


# --- asking ---


def meeting(count):
    """Lets none of the first requests be answered before so many are under way."""
    barrier = threading.Barrier(count, timeout=10)

    def before(number):
        if number < count:
            barrier.wait()

    return before


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_no_more_requests_are_under_way_than_allowed(asking, concurrency):
    one = asking(FakeModel(before=meeting(concurrency)), concurrency=concurrency, batch_size=2)
    one.ask()
    assert one.model.busiest == concurrency
    assert sum(one.told) == COUNT == one.sent
    assert one.model.received == dict.fromkeys(one.images.sha256, 1)
    assert one.stored() == set(one.images.sha256)


def test_answers_may_come_in_any_order(asking):
    """The first request is answered last."""
    release = threading.Event()

    def before(number):
        assert number or release.wait(10)

    def on_answers(count):
        if sum(one.told) == COUNT - BATCH:
            release.set()

    one = asking(FakeModel(before=before), on_answers, concurrency=2)
    one.ask()
    assert one.told == [4, 4, 4, 4, 2, 4]
    assert one.stored() == set(one.images.sha256)


def test_images_of_all_shapes_are_asked(asking):
    one = asking(images=mixed_images(), concurrency=3)
    one.ask()
    assert len(one.stored()) == 26 and len(one.model.asked) == 8


def test_requests_keep_their_distance(asking):
    one = asking(requests_per_second=25.0, concurrency=4)
    start = time.monotonic()
    one.ask()
    assert len(one.model.asked) == 6
    assert 5 / 25 <= time.monotonic() - start < 5


# --- tries ---


def failing(*numbers, error=None):
    """Raises at the requests of these numbers."""

    def before(number):
        if number in numbers:
            raise error or TransientError("it rests")

    return before


def test_what_may_pass_is_tried_again(asking):
    one = asking(FakeModel(before=failing(1, 2, 5)))
    one.ask()
    # Of six requests one is tried three times, another twice.
    assert len(one.model.asked) == 6 + 3
    assert one.model.asked[1] == one.model.asked[2] == one.model.asked[3]
    assert one.model.asked[5] == one.model.asked[6]
    assert one.told == [4, 4, 4, 4, 4, 2]
    assert one.stored() == set(one.images.sha256)
    assert one.sent == COUNT + 3 * BATCH


def test_pauses_double_up_to_the_longest(asking, monkeypatch):
    """Up to a random part, which is left out here."""
    monkeypatch.setattr(query, "_FIRST_PAUSE", 0.04)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    times = []

    def before(number):
        times.append(time.monotonic())
        failing(0, 1, 2, 3)(number)

    asking(FakeModel(before=before), max_attempts=5, max_backoff=0.1).ask()
    pauses = np.diff(times)[:4]
    assert (pauses >= [0.04, 0.08, 0.1, 0.1]).all()
    assert (pauses < np.array([0.04, 0.08, 0.1, 0.1]) + 1).all()


def test_pauses_differ(asking, monkeypatch):
    """Or else all who were sent away would come back at once."""
    monkeypatch.setattr(query, "_FIRST_PAUSE", 0.02)
    drawn, uniform = [], random.uniform

    def draw(low, high):
        drawn.append((low, high, uniform(low, high)))
        return drawn[-1][2]

    monkeypatch.setattr(random, "uniform", draw)
    asking(FakeModel(before=failing(0, 1, 3, 4))).ask()
    assert [(low, high) for low, high, _ in drawn] == [(0, 0.02), (0, 0.04)] * 2
    assert len({value for _, _, value in drawn}) == 4


def test_a_pause_that_is_asked_for_is_kept(asking):
    times = []
    error = TransientError("it rests", retry_after=0.3)

    def before(number):
        times.append(time.monotonic())
        failing(0, error=error)(number)

    asking(FakeModel(before=before)).ask()
    assert 0.3 <= times[1] - times[0] < 3


def test_all_keep_a_pause_that_one_was_asked_for(asking):
    resting, begun = threading.Event(), {}

    def before(number):
        begun[number] = time.monotonic()
        if number == 0:
            resting.set()
            raise TransientError("it rests", retry_after=0.5)
        if number == 1:
            assert resting.wait(10)
            time.sleep(0.1)

    asking(FakeModel(before=before), concurrency=2).ask()
    assert min(begun[number] for number in range(2, 7)) - begun[0] >= 0.5


def test_a_pause_beyond_the_longest_ends_it_at_once(asking):
    error = TransientError("it rests", retry_after=3.0)
    one = asking(FakeModel(before=failing(2, error=error)), max_backoff=2.9)
    start = time.monotonic()
    message = refusal(one.ask)
    assert time.monotonic() - start < 2
    assert message.startswith("teacher: it rests; it asks to wait 3 s, longer than ")
    assert "teacher.max_backoff = 2.9. What was answered is kept" in message
    assert len(one.model.asked) == 3 and len(one.stored()) == 2 * BATCH


@pytest.mark.parametrize("tries", [1, 3])
def test_it_gives_up_in_one_line_and_keeps_the_rest(asking, tries):
    one = asking(FakeModel(before=failing(*range(2, 99))), max_attempts=tries)
    message = refusal(one.ask)
    assert message.startswith(f"teacher: it rests; gave up after {tries} tries (")
    assert "teacher.max_attempts" in message
    assert message.endswith("What was answered is kept: the same command asks for the rest")
    assert len(one.model.asked) == 2 + tries
    assert one.stored() == set(one.images.sha256[: 2 * BATCH])
    again = asking()
    again.ask()
    assert set(again.model.received) == set(one.images.sha256[2 * BATCH :])
    assert again.stored() == set(one.images.sha256)


@pytest.mark.parametrize("error", [UserError("teacher: no\nentry"), ZeroDivisionError("oh")])
def test_what_will_not_pass_is_not_tried_again(asking, error):
    """What is under way is waited for and stored, and nothing more is begun."""
    release = threading.Event()

    def before(number):
        if number == 2:
            release.wait(10)
            time.sleep(0.3)
        if number == 3:
            release.set()
            raise error

    one = asking(FakeModel(before=before), concurrency=2)
    with pytest.raises(type(error)) as raised:
        one.ask()
    assert raised.value is error
    assert len(one.model.asked) == 4
    assert len(one.stored()) == 3 * BATCH


ANSWERS = {
    "integers": (lambda x: x.astype(int), "floating-point numbers, got int64"),
    "a row less": (lambda x: x[1:], "one row for each of 4 images, got the shape [3, 4]"),
    "a row more": (lambda x: np.concatenate([x, x[:1]]), "got the shape [5, 4]"),
    "one axis": (lambda x: x[:, 0], "got the shape [4]"),
    "a class less": (lambda x: x[:, 1:], "answered 3 classes, but teacher.labels names 4"),
    "another shape": (lambda x: x[:, None], "answered [1, 4], but [4] before"),
    "nan": (lambda x: np.where(x == x[0, 0], np.nan, x), "not finite"),
    "infinite": (lambda x: x - np.inf, "not finite"),
    "beyond float32": (lambda x: x.astype(np.float64) * 1e300, "not finite"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_none_is_refused(asking, name):
    change, words = ANSWERS[name]

    class Wrong(FakeModel):
        def answer(self, images):
            good = super().answer(images)
            return change(good) if len(self.asked) == 2 else good

    one = asking(Wrong())
    message = refusal(one.ask)
    assert message.startswith("teacher: fake ") and words in message
    assert len(one.model.asked) == 2  # not tried again
    assert one.stored() == set(one.images.sha256[:BATCH])


def test_doubles_are_stored_as_floats(asking):
    class Double(FakeModel):
        def answer(self, images):
            return super().answer(images).astype(np.float64)

    one = asking(Double())
    one.ask()
    assert one.stored() == set(one.images.sha256)


# --- budget ---


@pytest.mark.parametrize("concurrency", [1, 3])
def test_each_try_is_counted_and_no_more_is_sent_than_allowed(asking, concurrency):
    limit = 3 * BATCH + 1
    one = asking(FakeModel(before=failing(1)), max_queries=limit, concurrency=concurrency)
    message = refusal(one.ask)
    assert f"teacher.max_queries = {limit} is spent: 12 images were sent to fake" in message
    assert one.sent == sum(map(len, one.model.asked)) == 12
    assert len(one.stored()) == 2 * BATCH
    # What was sent before counts in every later run.
    again = asking(max_queries=COUNT + BATCH)
    again.ask()
    assert again.sent == COUNT + BATCH and again.stored() == set(again.images.sha256)


def test_an_image_is_counted_before_it_is_sent(asking):
    """Or else a run that is killed would forget it."""
    sent = []

    class Counting(FakeModel):
        def answer(self, images):
            sent.append(store.sent)
            return super().answer(images)

    one = asking(Counting())
    plan = one.plan()
    with one.store(write=True) as store:
        execute(plan, one.model, one.images, store, one.pace, lambda count: None)
    assert sent == [4, 8, 12, 16, 20, 22]


# --- interruptions ---


def test_an_interruption_stores_what_is_under_way(asking):
    """As Ctrl-C, which is raised in the main thread, whatever that does."""

    def interrupt(count):
        if sum(one.told) == BATCH:
            raise KeyboardInterrupt

    one = asking(FakeModel(before=meeting(3)), interrupt, concurrency=3)
    with pytest.raises(KeyboardInterrupt):
        one.ask()
    assert len(one.model.asked) == 3
    assert one.stored() == set(one.model.received)
    assert len(one.stored()) == 3 * BATCH and sum(one.told) == 3 * BATCH
    again = asking()
    again.ask()
    assert set(again.model.received) == set(one.images.sha256) - set(one.model.received)


def test_an_interruption_ends_a_pause(asking):
    resting = threading.Event()

    def before(number):
        if number == 1:
            resting.set()
            raise TransientError("it rests", retry_after=20.0)
        assert resting.wait(10)
        time.sleep(0.2)

    def interrupt(count):
        raise KeyboardInterrupt

    one = asking(FakeModel(before=before), interrupt, concurrency=2, max_backoff=30.0)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        one.ask()
    assert time.monotonic() - start < 5
    assert len(one.model.asked) == 2 and len(one.stored()) == BATCH


def test_an_interruption_ends_the_wait_for_a_turn(asking):
    def interrupt(count):
        raise KeyboardInterrupt

    one = asking(on_answers=interrupt, concurrency=3, requests_per_second=0.1)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        one.ask()
    assert time.monotonic() - start < 5
    assert len(one.model.asked) == 1


def test_the_first_interruption_is_told(asking):
    def fail(count):
        raise KeyboardInterrupt if len(one.told) == 1 else OSError("no space for the progress")

    one = asking(FakeModel(before=meeting(3)), fail, concurrency=3)
    with pytest.raises(KeyboardInterrupt):
        one.ask()
    assert len(one.stored()) == 3 * BATCH
