"""Plans and sends queries to a foundation model about images that have no stored answer."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.base import FoundationModel, Images, TransientError
from fedhelp_jax.teachers.store import AnswerStore

if TYPE_CHECKING:
    import tenacity

_FIRST_PAUSE = 0.5  # seconds


class QueryLimits(NamedTuple):
    """Limits on the rate, the retries and the number of queries.

    Attributes:
      batch_size: Images per request.
      concurrency: Maximum number of concurrent requests.
      requests_per_second: Maximum request rate; None sets no limit.
      max_attempts: Maximum number of attempts per request.
      max_backoff: Longest pause in seconds before an attempt.
      max_queries: Maximum number of images ever sent to this model, counting every attempt; None
        sets no limit.
    """

    batch_size: int
    concurrency: int
    requests_per_second: float | None
    max_attempts: int
    max_backoff: float
    max_queries: int | None


class Plan(NamedTuple):
    """The queries that remain to be made.

    Attributes:
      images: Number of distinct public images.
      known: Number of them that have a stored answer.
      batches: Indices of the images to ask about, one tuple per request; all images of a request
        have the same shape.
      bytes_out: Total size of the requests, estimated from the first; 0 for a local model.
      sent_before: Number of images sent to this model so far, counting every attempt.
    """

    images: int
    known: int
    batches: tuple[tuple[int, ...], ...]
    bytes_out: int
    sent_before: int

    @property
    def to_ask(self) -> int:
        """The number of images to ask about."""
        return self.images - self.known


def make_plan(
    model: FoundationModel, images: Images, store: AnswerStore, pace: QueryLimits
) -> Plan:
    """Returns the queries that remain to be made; asks nothing."""
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
    images: Images,
    store: AnswerStore,
    pace: QueryLimits,
    on_answers: Callable[[int], None],
) -> None:
    """Makes the planned queries and stores each answer as it arrives.

    At most ``pace.concurrency`` requests are unanswered or unstored at any time. After the first
    error, the rest of the plan is dropped; answers to pending requests are still awaited and
    stored.

    Args:
      plan: The plan, made by `make_plan`.
      model: The model; it is called from several threads.
      images: The images that the plan was made for.
      store: The store, open for writing.
      pace: The limits.
      on_answers: Called with the number of images answered, after they are stored.

    Raises:
      UserError: If the model refuses, stays unavailable, or gives an unusable answer; or if
        ``max_queries`` is exhausted.
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
            except BaseException as error:  # even if interrupted, store pending answers first
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
    """Spaces out requests to a maximum rate, and holds them back while the server asks to wait."""

    def __init__(self, per_second: float | None, stop: threading.Event):
        self._gap = 0.0 if per_second is None else 1 / per_second
        self._stop, self._lock, self._next = stop, threading.Lock(), 0.0

    def take(self) -> None:
        """Waits for a turn, or until ``stop`` is set."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        self._stop.wait(max(0.0, turn - time.monotonic()))

    def pause(self, seconds: float) -> None:
        """Gives out no turns for ``seconds``; threads that already have a turn keep it."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _retrying(pace: QueryLimits, stop: threading.Event) -> "tenacity.Retrying":
    """Returns a retrier for `TransientError`, with exponential backoff and jitter."""
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
        # `_RateLimiter` waits for as long as the server asked, for all requests.
        wait=tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE, max=pace.max_backoff),
        sleep=tenacity.sleep_using_event(stop),
        reraise=True,
    )


def _checked(model: FoundationModel, answer: np.ndarray, count: int) -> np.ndarray:
    """Returns a model's answer as float32, after checking that it has one finite row per image."""
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
