"""Stops a run after a round when the process is asked to end."""

import logging
import signal
import threading
from typing import Any

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request to stop after the round; the next kills."""

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in self._signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        del frame
        self.requested = True
        signal.signal(number, self._before[number])
        _log.warning("stopping after this round; once more to stop at once, without saving")
