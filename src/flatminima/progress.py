"""Progress with the time left, for anything longer than a second: the one home of our bars."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from flatminima.launch import rank_and_size

T = TypeVar("T")

PATIENCE_SECONDS = 1.0
"""Work that ends sooner shows nothing on a terminal."""
LINE_SECONDS = (3.0, 10.0, 30.0)
"""When lines are written where there is no terminal: the first, the second, and then every so many seconds."""
NOTEBOOK_SECONDS = 1.0
"""How often the line in a notebook is written anew."""

_SPEED_SECONDS = 120.0  # the past from which a live view tells the time left


_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextlib.contextmanager
def silent(silence: bool = True) -> Iterator[None]:
    """No bar is shown by what is called here, whoever would show it."""
    token = _silent.set(silence or _silent.get())
    try:
        yield
    finally:
        _silent.reset(token)


def terminal(enabled: bool = True) -> Console | None:
    """Standard error where bars are shown; None if they are not wanted, or it is no terminal."""
    console = Console(stderr=True)
    return console if enabled and not _silent.get() and console.is_terminal and not console.is_jupyter else None


class Lines:
    """Writes how far work is to standard error, now and then: for logs and pipes; in a notebook a line that changes.

    Nothing is written where progress is not wanted, on a terminal, and by all but the first of a launch's processes.

    Args:
        text: says how far it is; called in a thread of its own.
        enabled: whether it is wanted.
    """

    def __init__(self, text: Callable[[], str], enabled: bool = True) -> None:
        self._text, self._closed = text, threading.Event()
        self._notebook = Console(stderr=True).is_jupyter
        self._output = sys.stderr  # of this moment: what is redirected later is somebody else's
        self._thread = None
        wanted = enabled and not _silent.get() and rank_and_size()[0] == 0
        if wanted and terminal() is None:
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()

    def _write(self) -> None:
        if self._notebook:
            shown = 0
            while not self._closed.wait(NOTEBOOK_SECONDS):
                text = self._text()
                self._put(f"\r{text.ljust(shown)}")
                shown = len(text)
            self._put(f"\r{' ' * shown}\r")
            return
        first, second, others = LINE_SECONDS
        for seconds in (first, second - first):
            if self._closed.wait(seconds):
                return
            self._put(f"{self._text()}\n")
        while not self._closed.wait(others):
            self._put(f"{self._text()}\n")

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever reads it may have gone
            self._output.write(text)
            self._output.flush()

    def close(self) -> None:
        """No more lines."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()


class _Display:
    """What a thread's bars are shown by, one beneath the other: bars that are within others are no second view."""

    _of_thread = threading.local()

    def __init__(self, enabled: bool, elapsed: bool) -> None:
        console = terminal(enabled)
        self.bars = rich.progress.Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            *([TimeElapsedColumn()] if elapsed else []),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.users = 0
        self._lock, self._closed = threading.Lock(), False
        self._lines = Lines(self._said, enabled)
        self._timer = None
        if console is not None:
            self._timer = threading.Timer(PATIENCE_SECONDS, self._appear)
            self._timer.daemon = True
            self._timer.start()

    @classmethod
    def now(cls, enabled: bool, elapsed: bool) -> _Display:
        """The one that is shown, or a new one; a bar that is not wanted has one of its own."""
        shown: _Display | None = getattr(cls._of_thread, "display", None)
        if shown is None or not enabled or _silent.get():
            shown = cls(enabled, elapsed)
            if enabled and not _silent.get():
                cls._of_thread.display = shown
        return shown

    def _appear(self) -> None:
        with self._lock:
            if not self._closed:
                self.bars.start()

    def _said(self) -> str:
        return "; ".join(map(_in_words, self.bars.tasks))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            if self.bars.live.is_started:  # otherwise `stop` prints an empty line
                self.bars.stop()
        self._lines.close()
        if getattr(self._of_thread, "display", None) is self:
            del self._of_thread.display


def _in_words(task: rich.progress.Task) -> str:
    of = "" if task.total is None else f" of {task.total:g}"
    left = task.time_remaining if task.total is not None else None
    count = [f"{task.completed:g}{of}"] if task.total is not None or task.completed else []
    gone = [f"{timedelta(seconds=int(task.elapsed or 0))} so far"]
    rest = [] if left is None else [f"{timedelta(seconds=int(left))} left"]
    return f"{task.description}: {', '.join([*count, *gone, *rest])}"


class ProgressBar:
    """A bar on the terminal's standard error, gone at the end; it appears once the work has taken a second.

    Where there is no terminal it is a line now and then (:class:`Lines`). Within another one it is shown beneath it.
    """

    def __init__(
        self, description: str, total: int | None, *, completed: int = 0, enabled: bool = True, elapsed: bool = False
    ) -> None:
        self._description, self._total, self._completed = description, total, completed
        self._enabled, self._elapsed = enabled, elapsed

    def __enter__(self) -> ProgressBar:
        self._display = _Display.now(self._enabled, self._elapsed)
        self._display.users += 1
        self._task = self._display.bars.add_task(self._description, total=self._total, completed=self._completed)
        return self

    def update(self, completed: int, description: str) -> None:
        """So many are done."""
        self._display.bars.update(self._task, completed=completed, description=description)

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._display.bars.advance(self._task, count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.users -= 1
        if self._display.users == 0:
            self._display.close()  # which shows the task once more, as it is at the end
        self._display.bars.remove_task(self._task)


def track(items: Iterable[T], description: str, enabled: bool = True, *, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` beside a :class:`ProgressBar`.

    ``total`` is their number, needed where they have no length.
    """
    with ProgressBar(description, len(items) if isinstance(items, Sized) else total, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.advance()


def live_bars() -> rich.progress.Progress:
    """Bars beneath each other, to be drawn by a live view: each with a text for its ``status`` and its ``loss``."""
    return rich.progress.Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=4, no_wrap=True, overflow="ellipsis")),
        BarColumn(None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[loss]}", markup=False, table_column=Column(no_wrap=True)),
        TimeRemainingColumn(),
        auto_refresh=False,
        speed_estimate_period=_SPEED_SECONDS,
    )
