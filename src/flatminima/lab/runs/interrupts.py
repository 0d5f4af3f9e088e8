"""When a run saves, and when it stops: Ctrl-C waits for the present update, and for all processes."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from flatminima.parallel import Processes

EPOCH_END_SECONDS = 5.0
"""At an epoch's end, save only if the last resume point is older than this."""
ASKING_SECONDS = 1.0
"""How often processes ask each other whether to save or to stop."""


class Breaks:
    """After which updates to save, and after which to stop: the same ones for all processes.

    To ask each other after every update would make them wait for each other's devices, so several processes ask only
    about once a second, and at an epoch's end, where they meet anyway.
    """

    def __init__(self, processes: Processes, iteration: int, checkpoint_seconds: float) -> None:
        self._processes, self._checkpoint_seconds = processes, checkpoint_seconds
        self._save_time = self._question_time = time.monotonic()
        self._question_iteration = self._next_question = iteration

    def agree(self, iteration: int, epoch_ended: bool, interrupted: bool) -> tuple[bool, bool]:
        """Whether to save now, and whether to stop; an interruption of any process stops all."""
        if iteration < self._next_question and not epoch_ended:
            return False, False
        now = time.monotonic()
        patience = min(self._checkpoint_seconds, EPOCH_END_SECONDS) if epoch_ended else self._checkpoint_seconds
        answers = self._processes.gather(
            lambda: (interrupted, now - self._save_time >= patience, self._ahead(iteration, now))
        )
        self._question_time, self._question_iteration = now, iteration
        _, overdue, ahead = answers[0]
        self._next_question = iteration + ahead
        stops = any(answer[0] for answer in answers)
        return stops or overdue, stops

    def saved(self) -> None:
        """The run was saved just now."""
        self._save_time = time.monotonic()

    def _ahead(self, iteration: int, now: float) -> int:
        """Updates until the processes ask again, at the pace since they last did."""
        if self._processes.size == 1:
            return 1
        seconds = max(now - self._question_time, 1e-9)
        wanted = min(ASKING_SECONDS, self._checkpoint_seconds)
        return max(1, int((iteration - self._question_iteration) / seconds * wanted))


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Set the event on Ctrl-C instead of breaking off in the middle of an update; a second Ctrl-C breaks off.

    Only where Ctrl-C (or SIGTERM, in worker processes) would raise KeyboardInterrupt: not in threads, and not where the
    caller has its own handler.
    """
    requested = threading.Event()

    def handle(signal_number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    in_main_thread = threading.current_thread() is threading.main_thread()
    interrupting = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is signal.default_int_handler]
    if not in_main_thread:
        interrupting = []
    for number in interrupting:
        signal.signal(number, handle)
    try:
        yield requested
    finally:
        for number in interrupting:
            signal.signal(number, signal.default_int_handler)
