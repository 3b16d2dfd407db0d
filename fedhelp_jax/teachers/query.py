"""Asking a foundation model about images that the store has no answers for: planned, then done."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.base import FoundationModel, PublicImages, TransientError
from fedhelp_jax.teachers.store import AnswerStore

if TYPE_CHECKING:
    import tenacity

_FIRST_PAUSE = 0.5  # seconds


class QueryLimits(NamedTuple):
    """How fast, how often and how much may be asked.

    Attributes:
      batch_size: Images a request.
      concurrency: Requests under way at once.
      requests_per_second: At most; None sets no limit.
      max_attempts: Times that a request is tried.
      max_backoff: Longest pause in seconds before a try.
      max_queries: Images ever sent to this model, each try counted; None sets no limit.
    """

    batch_size: int
    concurrency: int
    requests_per_second: float | None
    max_attempts: int
    max_backoff: float
    max_queries: int | None


class Plan(NamedTuple):
    """What there is to ask.

    Attributes:
      images: Distinct public images.
      known: Those of them with a stored answer.
      batches: Places of those to ask, a tuple a request, all images in one of one shape.
      bytes_out: What the requests hold in all, judged by the first; 0 for a local model.
      sent_before: Images that were sent to this model before, each try counted.
    """

    images: int
    known: int
    batches: tuple[tuple[int, ...], ...]
    bytes_out: int
    sent_before: int

    @property
    def to_ask(self) -> int:
        """Images to ask about."""
        return self.images - self.known


def make_plan(
    model: FoundationModel, images: PublicImages, store: AnswerStore, pace: QueryLimits
) -> Plan:
    """Returns what is to be asked; asks nothing."""
    known = store.known(images.sha256)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, (sha, shape) in enumerate(zip(images.sha256, images.shapes, strict=True)):
        if sha not in known:
            by_shape.setdefault(shape, []).append(place)
    size = min(pace.batch_size, model.batch_limit or pace.batch_size)
    batches = tuple(
        tuple(places[start : start + size])
        for places in by_shape.values()
        for start in range(0, len(places), size)
    )
    bytes_out = 0
    if batches:
        first = model.request_bytes(images.take(batches[0]))
        bytes_out = round(first / len(batches[0]) * sum(len(batch) for batch in batches))
    return Plan(len(images), len(known), batches, bytes_out, store.sent)


def execute(
    plan: Plan,
    model: FoundationModel,
    images: PublicImages,
    store: AnswerStore,
    pace: QueryLimits,
    on_answers: Callable[[int], None],
) -> None:
    """Asks what is planned and stores each answer as it comes.

    At most ``pace.concurrency`` requests are unanswered or unstored at any time. Of the first
    error the rest of the plan is dropped, but what is under way is waited for and stored.

    Args:
      plan: Made by `make_plan`.
      model: Asked from several threads.
      images: As the plan was made for.
      store: Open for writing.
      pace: The limits.
      on_answers: Called with the number of images answered, after they are stored.

    Raises:
      UserError: If the model refuses, stays away, or answers what cannot be used; or
        ``max_queries`` is spent.
    """
    stop = threading.Event()
    turns = _RateLimiter(pace.requests_per_second, stop)

    def ask(batch: tuple[int, ...]) -> np.ndarray:
        asked = images.take(batch)

        def once() -> np.ndarray:
            turns.take()
            if stop.is_set():
                raise TransientError("stopped")
            store.consume_quota(len(asked), pace.max_queries)
            try:
                return _checked(model, model.answer(asked), len(asked))
            except TransientError as error:
                turns.pause(error.retry_after or 0.0)
                raise

        return _retrying(pace, stop)(once)

    failure: BaseException | None = None
    waiting = iter(plan.batches)
    pool = ThreadPoolExecutor(pace.concurrency, thread_name_prefix="ask")
    under_way: dict[Future[np.ndarray], tuple[int, ...]] = {}
    try:
        while True:
            while failure is None and len(under_way) < pace.concurrency:
                batch = next(waiting, None)
                if batch is None:
                    break
                under_way[pool.submit(ask, batch)] = batch
            if not under_way:
                break
            try:
                for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                    batch = under_way.pop(done)
                    store.put([images.sha256[place] for place in batch], done.result())
                    on_answers(len(batch))
            except BaseException as error:  # an interruption too: paid answers are stored first
                failure = failure or error
                stop.set()
    finally:
        stop.set()
        pool.shutdown()
    if isinstance(failure, TransientError):
        why = f"gave up after {pace.max_attempts} tries (teacher.max_attempts)"
        if (failure.retry_after or 0) > pace.max_backoff:
            why = (
                f"it asks to wait {failure.retry_after:.0f} s, longer than teacher.max_backoff = "
                f"{pace.max_backoff:g}"
            )
        raise UserError(
            f"teacher: {failure}; {why}. What was answered is kept: the same command asks for "
            "the rest"
        )
    if failure is not None:
        raise failure


class _RateLimiter:
    """Lets requests go one after another: so many a second, and none while the server rests."""

    def __init__(self, per_second: float | None, stop: threading.Event):
        self._gap = 0.0 if per_second is None else 1 / per_second
        self._stop, self._lock, self._next = stop, threading.Lock(), 0.0

    def take(self) -> None:
        """Waits for a turn, or until all is stopped."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        self._stop.wait(max(0.0, turn - time.monotonic()))

    def pause(self, seconds: float) -> None:
        """Gives out no turn for so long; those that are waiting for one keep theirs."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _retrying(pace: QueryLimits, stop: threading.Event) -> "tenacity.Retrying":
    """Returns what calls a function again on a `TransientError`: backing off, with jitter."""
    import tenacity

    def asked_pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return (error.retry_after if isinstance(error, TransientError) else None) or 0.0

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        stop=lambda state: (
            state.attempt_number >= pace.max_attempts
            or stop.is_set()
            or asked_pause(state) > pace.max_backoff
        ),
        # What the server asked for is waited for by `_RateLimiter`, for all requests.
        wait=tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE, max=pace.max_backoff),
        sleep=tenacity.sleep_using_event(stop),
        reraise=True,
    )


def _checked(model: FoundationModel, answer: np.ndarray, count: int) -> np.ndarray:
    """Returns what a model answered, if it can be one answer for each image."""
    name, labels = model.fingerprint.name, model.fingerprint.label_names
    if not np.issubdtype(answer.dtype, np.floating):
        raise UserError(f"teacher: {name} must answer floating-point numbers, got {answer.dtype}")
    if answer.ndim < 2 or answer.shape[0] != count:
        raise UserError(
            f"teacher: {name} must answer one row for each of {count} images, got the shape "
            f"{list(answer.shape)}"
        )
    if labels and answer.shape[-1] != len(labels):
        raise UserError(
            f"teacher: {name} answered {answer.shape[-1]} classes, but teacher.labels names "
            f"{len(labels)}"
        )
    with np.errstate(over="ignore"):
        answer = answer.astype(np.float32)
    if not np.isfinite(answer).all():
        raise UserError(f"teacher: {name} answered numbers that are not finite (NaN or infinity)")
    return answer
