"""Progress with the time left, for anything longer than two seconds: the one home of our bars."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from types import TracebackType
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

T = TypeVar("T")

PATIENCE_SECONDS = 2.0
"""Work that ends sooner shows nothing."""

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
    return console if enabled and not _silent.get() and console.is_terminal else None


class ProgressBar:
    """A bar on the terminal's standard error, gone at the end; it appears once the work has taken two seconds."""

    def __init__(
        self, description: str, total: int | None, *, completed: int = 0, enabled: bool = True, elapsed: bool = False
    ) -> None:
        self._console = terminal(enabled)
        self._bar = rich.progress.Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            *([TimeElapsedColumn()] if elapsed else []),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(description, total=total, completed=completed)
        self._appears_at = time.monotonic() + PATIENCE_SECONDS

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, completed: int, description: str) -> None:
        """So many are done."""
        self._bar.update(self._task, completed=completed, description=description)
        self._appear()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._bar.advance(self._task, count)
        self._appear()

    def _appear(self) -> None:
        if self._console is not None and not self._bar.live.is_started and time.monotonic() >= self._appears_at:
            self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:  # otherwise `stop` prints an empty line
            self._bar.stop()


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
