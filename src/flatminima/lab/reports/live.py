"""A live view of runs in progress, wherever they are: it reads what they say in their folders."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from flatminima.lab.experiments import Task
from flatminima.lab.jobs import Failure
from flatminima.lab.runs import RunProgress
from flatminima.progress import PATIENCE_SECONDS

Outcome = TypeVar("Outcome")

_LOOK_SECONDS = 1.0


_SPEED_SECONDS = 120.0  # the past from which the time left is told


def watch(
    ended: Iterable[tuple[int, Outcome]], total: int, runs: Sequence[Task], description: str, enabled: bool = True
) -> Iterator[tuple[int, Outcome]]:
    """Yield what has ``ended``; on a terminal, show meanwhile how far each of the ``runs`` in progress is.

    An overall bar of ``total`` runs, and beneath it a line for every run in progress: epoch, loss, time left. On
    standard error, once it has taken two seconds; gone at the end.
    """
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield from ended
        return
    view = _View(total, runs, description, console)
    try:
        for number, outcome in ended:
            view.end(failed=isinstance(outcome, Failure))
            yield number, outcome
    finally:
        view.close()


class _View:
    """Looks at the folders once a second, in a thread of its own."""

    def __init__(self, total: int, runs: Sequence[Task], description: str, console: Console) -> None:
        self._total, self._runs, self._console = total, runs, console
        # of processes that were killed, until something newer stands there
        self._stale = [run.folder.progress_written() for run in runs]
        self._ended = self._failed = 0
        self._lines: dict[int, TaskID] = {}
        self._progress = Progress(
            TextColumn(
                "{task.description}", markup=False, table_column=Column(ratio=4, no_wrap=True, overflow="ellipsis")
            ),
            BarColumn(None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[loss]}", markup=False, table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
            auto_refresh=False,
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._live = Live(console=console, transient=True, auto_refresh=False, get_renderable=self._table)
        self._overall = self._progress.add_task(description, total=total, status="", loss="")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def end(self, *, failed: bool) -> None:
        self._ended += 1
        self._failed += failed

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        if self._live.is_started:  # otherwise `stop` prints an empty line
            self._live.stop()

    def _look_on(self) -> None:
        appears_at = time.monotonic() + PATIENCE_SECONDS
        while not self._closed.wait(_LOOK_SECONDS):
            self._look()
            if not self._live.is_started and time.monotonic() >= appears_at:
                self._live.start()
            self._live.refresh()

    def _table(self) -> Table:
        """As wide as the terminal, but for the ``^C`` that it may write after the last line."""
        table = self._progress.make_tasks_table(self._progress.tasks)
        table.width = max(1, self._console.width - len(" ^C"))
        return table

    def _look(self) -> None:
        begun = 0.0
        for number, run in enumerate(self._runs):
            written = run.folder.progress_written()
            progress = None if written in (None, self._stale[number]) else run.folder.read_progress()
            if progress is not None:
                self._show(number, progress)
                begun += progress.fraction
            elif number in self._lines:
                self._progress.remove_task(self._lines.pop(number))
        status = f"{self._ended}/{self._total} runs" + (f", {self._failed} failed" if self._failed else "")
        self._progress.update(self._overall, completed=min(self._ended + begun, self._total), status=status)

    def _show(self, number: int, progress: RunProgress) -> None:
        if number not in self._lines:
            label = f"  {self._runs[number].label}"
            self._lines[number] = self._progress.add_task(label, total=1.0, status="", loss="")
        training = progress.doing == "training"
        self._progress.update(
            self._lines[number],
            completed=progress.fraction,
            status=f"epoch {progress.epoch}/{progress.epochs}" if training else progress.doing,
            loss="" if progress.loss is None else f"loss {progress.loss:.3g}",
        )
