"""Progress with the time left, for anything longer than a second: the one home of our bars."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import rich
import rich.progress
import rich.progress_bar
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from flatminima.launch import rank_and_size

T = TypeVar("T")

PATIENCE_SECONDS = 1.0
"""Work that ends sooner shows nothing on a terminal."""
LINE_SECONDS = (3.0, 10.0, 30.0)
"""When lines are written where there is no terminal: the first, the second, and then every so many seconds."""
NOTEBOOK_SECONDS = 1.0
"""How often the line in a notebook is written anew."""

ROOM = len(" ^C")
"""Columns left free at the end of a line: a terminal that is told to interrupt says so there."""

_SPEED_SECONDS = 120.0  # the past from which the time left is told

_BAR_COLUMNS = (10, 40)  # a bar's, at least and at most

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
    return console if _wanted(enabled) and console.is_terminal and not console.is_jupyter else None


def _wanted(enabled: bool) -> bool:
    """Of several processes the first alone shows anything."""
    return enabled and not _silent.get() and rank_and_size()[0] == 0


class Lines:
    """Writes how far work is to standard error, now and then: for logs and pipes; in a notebook a line that changes.

    Nothing is written where progress is not wanted, on a terminal, and by all but the first of a launch's processes.

    Args:
        text: says how far it is, or nothing; called in a thread of its own.
        enabled: whether it is wanted.
    """

    def __init__(self, text: Callable[[], str], enabled: bool = True) -> None:
        self._text, self._closed = text, threading.Event()
        self._notebook = Console(stderr=True).is_jupyter
        self._output = sys.stderr  # of this moment: what is redirected later is somebody else's
        self._thread = None
        if _wanted(enabled) and terminal() is None:
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
            self._say()
        while not self._closed.wait(others):
            self._say()

    def _say(self) -> None:
        text = self._text()
        if text:
            self._put(f"{text}\n")

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

    def __init__(self, enabled: bool) -> None:
        self.bars: list[ProgressBar] = []
        console = terminal(enabled)
        self._console = console or rich.get_console()  # the other one is never written to
        self._lock, self._closed, self._away = threading.Lock(), False, False
        self._live = Live(console=self._console, transient=True, get_renderable=self._drawn, refresh_per_second=10)
        self._lines = Lines(self._said, enabled)
        self._timer = None
        if console is not None:
            self._timer = threading.Timer(PATIENCE_SECONDS, self._appear)
            self._timer.daemon = True
            self._timer.start()

    @classmethod
    def present(cls) -> _Display | None:
        """The one that this thread shows."""
        return getattr(cls._of_thread, "display", None)

    @classmethod
    def now(cls, enabled: bool) -> _Display:
        """The one that is shown, or a new one; a bar that is not wanted has one of its own."""
        shown = cls.present()
        if shown is None or not _wanted(enabled):
            shown = cls(enabled)
            if _wanted(enabled):
                cls._of_thread.display = shown
        return shown

    def _appear(self) -> None:
        with self._lock:
            if not self._closed and not self._away:
                self._live.start(refresh=True)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nothing is shown, and then again what was."""
        with self._lock:
            self._away = True
            shown = self._live.is_started
            if shown:
                self._live.stop()
        try:
            yield
        finally:
            self._away = False
            if shown or (self._timer is not None and not self._timer.is_alive()):
                self._appear()

    def _shown(self) -> list[ProgressBar]:
        """Not what says no more than that something is done, where a bar within it says what; nor what is in parts."""
        bars = self.bars.copy()
        whole = next((number for number, bar in enumerate(bars) if bar.in_parts), len(bars))
        return [] if self._away else [bar for bar in bars[: whole + 1] if bar.total is not None or bar is bars[-1]]

    def _description(self, bar: ProgressBar) -> str:
        within = self.bars[-1:]
        return f"{bar.description}: {within[0].description}" if bar.in_parts and within != [bar] else bar.description

    def _drawn(self) -> RenderableType:
        """A line for every bar, below an empty one: what another program shows ends where the terminal's cursor is."""
        columns = self._console.width - ROOM
        rows = [(self._description(bar), bar, bar.count(), bar.time) for bar in self._shown()]
        others = max((len(text) + len(count) + len(left) + 3 for text, _, count, left in rows), default=0)
        least, most = _BAR_COLUMNS
        width = max(least, min(most, columns - others))
        table = Table.grid(Column(), *(Column(no_wrap=True) for _ in range(3)), padding=(0, 1))
        for text, bar, count, left in rows:
            description = Text(text, no_wrap=True, overflow="ellipsis")
            table.add_row(description, bar.drawn(width), Text(count, "progress.download"), Text(left, "cyan"))
        return Group(Text(), Constrain(table, columns))

    def _said(self) -> str:
        def words(bar: ProgressBar) -> str:
            return ", ".join(filter(None, (bar.count(" of "), bar.time_so_far, bar.time_left)))

        return "; ".join(f"{self._description(bar)}: {words(bar)}" for bar in self._shown())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            if self._live.is_started:  # otherwise `stop` prints an empty line
                self._live.stop()
        self._lines.close()
        if self.present() is self:
            del self._of_thread.display


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """The bars are away as long as something else is drawn in their place, such as a live view of several processes."""
    display = _Display.present()
    with contextlib.nullcontext() if display is None else display.away():
        yield


class _Pace:
    """How fast work goes, by its last steps."""

    def __init__(self, completed: float) -> None:
        self.began = time.monotonic()
        self._steps = deque([(self.began, completed)], maxlen=1000)

    def step(self, completed: float) -> None:
        """So much is done now."""
        now = time.monotonic()
        self._steps.append((now, completed))
        while len(self._steps) > 2 and self._steps[1][0] < now - _SPEED_SECONDS:
            self._steps.popleft()

    def seconds_left(self, total: float) -> float | None:
        """Not known before the first step has ended."""
        (start, before), (end, completed) = self._steps[0], self._steps[-1]
        if completed <= before:
            return None
        return max(0.0, (total - completed) * (end - start) / (completed - before) - (time.monotonic() - end))


class ProgressBar:
    """A bar on the terminal's standard error, gone at the end; it appears once the work has taken a second.

    Where there is no terminal it is a line now and then (:class:`Lines`). Within another one it is shown beneath it.

    Args:
        description: what is done.
        total: how many steps that is; None, if nobody knows: it then shows for how long it has gone on, and only as
            long as there is no bar within it.
        completed: steps that are done already.
        enabled: whether it is wanted.
        in_parts: each of its steps is a work with bars of its own, which are then named in this one, and not shown.
        is_part: among such bars, the one by which the step of the outer one is measured.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        completed: int = 0,
        enabled: bool = True,
        in_parts: bool = False,
        is_part: bool = False,
    ) -> None:
        self.description, self.total, self.in_parts = description, total, in_parts
        self._completed: float = completed
        self._enabled, self._is_part = enabled, is_part

    def __enter__(self) -> ProgressBar:
        self._pace = _Pace(self._completed)
        self._display = _Display.now(self._enabled)
        self._whole = next((bar for bar in self._display.bars if bar.in_parts), None) if self._is_part else None
        self._display.bars.append(self)
        return self

    def update(self, completed: float, description: str | None = None) -> None:
        """So many are done."""
        self._completed = completed
        self._pace.step(completed)
        if description is not None:
            self.description = description
        if self._whole is not None and self.total:
            self._whole.update(int(self._whole._completed) + min(self._completed / self.total, _NEARLY_ALL))

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.update(int(self._completed) + count)

    def drawn(self, width: int) -> RenderableType:
        """The bar itself."""
        now = time.monotonic()
        return rich.progress_bar.ProgressBar(self.total, self._completed, width, self.total is None, animation_time=now)

    def count(self, of: str = "/") -> str:
        """How many are done, of how many."""
        done = int(self._completed)
        return f"{done}{of}{self.total}" if self.total is not None else str(done or "")

    @property
    def time(self) -> str:
        """What is left, or where nobody knows, what it has taken."""
        return self.time_so_far if self.total is None else self.time_left or "-:--:-- left"

    @property
    def time_so_far(self) -> str:
        """What it has taken."""
        return f"{timedelta(seconds=int(time.monotonic() - self._pace.began))} so far"

    @property
    def time_left(self) -> str:
        """What it will take, or nothing where that is not known."""
        seconds = None if self.total is None else self._pace.seconds_left(self.total)
        return "" if seconds is None else f"{timedelta(seconds=int(seconds))} left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._display.bars == [self]:
            self._display.close()  # which shows the bar once more, as it is at the end
        self._display.bars.remove(self)


_NEARLY_ALL = 0.999  # of a part whose own bar is at its end: it has ended when the next one begins


def track(
    items: Iterable[T], description: str, enabled: bool = True, *, total: int | None = None, is_part: bool = False
) -> Iterator[T]:
    """Yield ``items`` beside a :class:`ProgressBar`.

    ``total`` is their number, needed where they have no length; ``is_part`` as of the bar.
    """
    number = len(items) if isinstance(items, Sized) else total
    with ProgressBar(description, number, enabled=enabled, is_part=is_part) as bar:
        for item in items:
            yield item
            bar.advance()


def track_parts(parts: Mapping[str, T], enabled: bool = True) -> Iterator[tuple[str, T]]:
    """Yield names and parts, each a work with bars of its own, beside one bar for all; a single part has its own."""
    if len(parts) == 1:
        yield from parts.items()
        return
    with ProgressBar("", len(parts), enabled=enabled, in_parts=True) as bar:
        for number, (name, part) in enumerate(parts.items()):
            bar.update(number, name)
            yield name, part


class _TimeLeftColumn(TimeRemainingColumn):
    """Nothing for a bar without a ``bound``, else the time behind its text."""

    def render(self, task: rich.progress.Task) -> Text:
        bound: str | None = task.fields["bound"]
        return Text() if bound is None else Text(bound, "progress.remaining").append_text(super().render(task))


def live_bars() -> rich.progress.Progress:
    """Bars beneath each other, to be drawn by a live view.

    Each has a text for its ``status`` and its ``loss``, and one before its time left, ``bound``, such as "at most ";
    None where that time cannot be told.
    """
    return rich.progress.Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=4, no_wrap=True, overflow="ellipsis")),
        BarColumn(None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[loss]}", markup=False, table_column=Column(no_wrap=True)),
        _TimeLeftColumn(),
        auto_refresh=False,
        speed_estimate_period=_SPEED_SECONDS,
    )
