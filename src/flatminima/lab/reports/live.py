"""A live view of runs in progress, wherever they are: it reads what they say in their folders."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import rich.table
from rich.console import Console
from rich.live import Live
from rich.progress import TaskID

from flatminima import progress
from flatminima.lab.experiments import Task
from flatminima.lab.jobs import Failure
from flatminima.lab.runs import RunProgress

Outcome = TypeVar("Outcome")

LOOK_SECONDS = 1.0
"""How often the folders are looked at."""


def watch(
    ended: Iterable[tuple[int, Outcome]],
    total: int,
    runs: Sequence[Task],
    description: str,
    enabled: bool = True,
    *,
    settled: int = 0,
    may_end_early: bool = False,
) -> Iterator[tuple[int, Outcome]]:
    """Yield what has ``ended``; show meanwhile how far each of the ``runs`` in progress is.

    On a terminal, an overall bar of ``total`` runs, and beneath it a line for every run in progress: epoch, loss, time
    left; on standard error, once it has taken a second; gone at the end. Elsewhere the same in a line now and then.
    The time left is told by what is done meanwhile: the first ``settled`` of the runs ended before, and what is first
    seen of another may be an earlier sitting's.
    Of runs that may end early, before their last epoch, the time left is a bound, and that of all is not told.
    """
    with progress.aside():
        view = _View(total, runs, description, progress.terminal(enabled), enabled, may_end_early)
        try:
            for place, (number, outcome) in enumerate(ended):
                view.end(number, failed=isinstance(outcome, Failure), before=place < settled)
                yield number, outcome
        finally:
            view.close()


class _View:
    """Looks at the folders once a second, in a thread of its own."""

    def __init__(
        self,
        total: int,
        runs: Sequence[Task],
        description: str,
        console: Console | None,
        enabled: bool,
        may_end_early: bool,
    ) -> None:
        self._total, self._runs = total, runs
        # how much of the work is done when a run ends early is known only then: a pace from it would be a wild one
        self._bound, bound = ("at most ", None) if may_end_early else ("", "")
        self._width = None if console is None else console.width
        # of processes that were killed, until something newer stands there
        self._stale = [run.folder.progress_written() for run in runs]
        self._ended = self._failed = 0
        self._lines: dict[int, TaskID] = {}
        # how much of each is done: where a run says no more, until its end is known, which may take seconds
        self._begun: dict[int, float] = {}
        self._bars = progress.live_bars()
        self._live = Live(console=console, transient=True, auto_refresh=False, get_renderable=self._table)
        self._overall = self._bars.add_task(description, total=total, status="", loss="", bound=bound)
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._lines_of_text = progress.Lines(self._said, enabled)
        self._thread = None
        if console is not None:
            self._thread = threading.Thread(target=self._look_on, daemon=True)
            self._thread.start()

    def end(self, number: int, *, failed: bool, before: bool) -> None:
        with self._lock:
            self._begun.pop(number, None)
            self._ended += 1
            self._failed += failed
            self._count_as_done_before(self._overall, float(before))

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self._lines_of_text.close()
        if self._live.is_started:  # otherwise `stop` prints an empty line
            self._live.stop()

    def _look_on(self) -> None:
        appears_at = time.monotonic() + progress.PATIENCE_SECONDS
        while not self._closed.wait(LOOK_SECONDS):
            self._look()
            if not self._live.is_started and time.monotonic() >= appears_at:
                self._live.start()
            self._live.refresh()

    def _table(self) -> rich.table.Table:
        """As wide as the terminal, but for the ``^C`` that it may write after the last line."""
        table = self._bars.make_tasks_table(self._bars.tasks)
        table.width = None if self._width is None else max(1, self._width - progress.ROOM)
        return table

    def _said(self) -> str:
        """In words: how many runs have ended, how far the others are, the time left."""
        self._look()
        overall, *others = self._bars.tasks
        left = None if overall.fields["bound"] is None else overall.time_remaining
        parts = [f"{overall.description}: {overall.fields['status']}"]
        parts += [] if left is None else [f"{timedelta(seconds=int(left))} left"]
        parts += [f"{each.description.strip()} {each.fields['status']}" for each in others]
        return ", ".join(parts)

    def _count_as_done_before(self, bar: TaskID, runs: float) -> None:
        """Without a step of the bar, by which its pace is told."""
        next(task for task in self._bars.tasks if task.id == bar).completed += runs

    def _look(self) -> None:
        with self._lock:
            self._look_at_folders()

    def _look_at_folders(self) -> None:
        for number, run in enumerate(self._runs):
            written = run.folder.progress_written()
            told = None if written in (None, self._stale[number]) else run.folder.read_progress()
            if told is not None:
                self._show(number, told)
            elif number in self._lines:
                self._bars.remove_task(self._lines.pop(number))
        status = f"{self._ended}/{self._total} runs" + (f", {self._failed} failed" if self._failed else "")
        if not self._lines and self._ended < self._total:
            status += ", starting"  # workers, or the next run
        completed = min(self._ended + sum(self._begun.values()), self._total)
        self._bars.update(self._overall, completed=completed, status=status)

    def _show(self, number: int, told: RunProgress) -> None:
        if number not in self._lines:
            label = f"  {self._runs[number].label}"
            self._lines[number] = self._bars.add_task(label, total=1.0, status="", loss="", bound=self._bound)
            self._count_as_done_before(self._lines[number], told.fraction)
        if number not in self._begun:
            self._count_as_done_before(self._overall, told.fraction)
        self._begun[number] = told.fraction
        training = told.doing == "training"
        self._bars.update(
            self._lines[number],
            completed=told.fraction,
            status=f"epoch {told.epoch}/{told.epochs}" if training else told.doing,
            loss="" if told.loss is None else f"loss {told.loss:.3g}",
        )
