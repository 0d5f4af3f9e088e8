"""Ground: progress with time left, for anything longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

PATIENCE_SECONDS = 2.0
"""Work that ends sooner shows nothing."""


def track(items: Iterable[T], description: str, enabled: bool = True, *, total: int | None = None) -> Iterator[T]:
    """Yield ``items``; show a bar with the time left on the terminal's standard error once it has taken two seconds.

    ``total`` is their number, needed where they have no length.
    """
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield from items
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    started, shown = time.monotonic(), False
    task = bar.add_task(description, total=len(items) if isinstance(items, Sized) else total)
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and time.monotonic() - started > PATIENCE_SECONDS:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()
