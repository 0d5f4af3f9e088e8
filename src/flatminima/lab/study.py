"""Experiments from end to end: run, report. Whatever is finished is kept, and never done twice."""

from __future__ import annotations

import abc
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from flatminima.errors import FlatminimaError
from flatminima.lab.data import load_data
from flatminima.lab.experiments import (
    Archive,
    Experiment,
    Record,
    SearchTrial,
    Summary,
    Task,
    Tuning,
    Unfinished,
    costs,
    look_up,
    perform,
    perform_search_trial,
    select,
    summarize,
    winners_of,
    write_winners,
)
from flatminima.lab.jobs import Executor, Failure
from flatminima.lab.reports import failure_lines, line_of, progress_line, tables, watch, write_json, write_reports
from flatminima.progress import ProgressBar, track

REPORT_SECONDS = 120.0
"""How often the page is brought up to date while runs go on; it takes some seconds. Its JSON has every run at once."""


class Study(abc.ABC):
    """Experiments that share a folder and a page; a subclass says which, and where."""

    names: tuple[str, ...]
    """The experiments."""
    executor: Executor
    """Where runs go."""
    workers: int
    """Runs at once, as far as estimates of time need to know."""
    by_setting = False
    """Whether one setting is finished after the other; else one seed is."""

    @property
    @abc.abstractmethod
    def folder(self) -> Path:
        """Where everything is; runs are in its folder ``runs``."""

    @property
    @abc.abstractmethod
    def page(self) -> Path:
        """The page of these experiments; beside it stands the same as Markdown and as JSON."""

    @property
    @abc.abstractmethod
    def heading(self) -> str:
        """The page's."""

    @property
    @abc.abstractmethod
    def lead(self) -> str:
        """What the page begins with."""

    @abc.abstractmethod
    def experiment(self, name: str) -> Experiment:
        """One of them, with what is known of it so far."""

    def tuning(self, name: str) -> Tuning | None:
        """How an experiment is searched by trials, if it is."""
        return None

    @property
    def archive(self) -> Archive:
        """Runs that are finished elsewhere."""
        return Archive()

    def tasks(self, name: str) -> list[Task]:
        """One experiment's runs."""
        return self.experiment(name).tasks(self.folder / "runs", by_setting=self.by_setting)

    def run(self, *, progress: bool = True, tell: Callable[[str], None] | None = None) -> list[Summary]:
        """Train and measure what is not yet, and report; a failed run is reported and the others go on.

        Args:
            progress: show a live view on a terminal.
            tell: called with a line as an experiment begins, and as soon as all seeds of a setting are known.

        Returns:
            The summary of every experiment.

        Raises:
            FlatminimaError: the data cannot be loaded.
        """
        left = [task for name in self.names for task in State.of(self.tasks(name), {}, self.archive).left]
        for source in track(sorted({task.setting.spec.source for task in left}), "reading data", progress):
            load_data(source)  # now, and not in every run: what is wrong is said once, and what is slow is done once
        failures: dict[str, str] = {}
        journal = _Journal(self, failures)
        try:
            for name in self.names:
                self._run(name, failures, journal, progress, tell)
        finally:
            with ProgressBar("writing the page", None, enabled=progress):
                summaries = [self.summary(name, failures) for name in self.names]
                self.report(summaries)
        return summaries

    def _run(
        self,
        name: str,
        failures: dict[str, str],
        journal: _Journal,
        progress: bool,
        tell: Callable[[str], None] | None,
    ) -> None:
        """One experiment; what is known of it already comes first, and is not run."""
        experiment, tuning, runs = self.experiment(name), self.tuning(name), self.tasks(name)
        work: Callable[[Any], Any] = perform if tuning is None else perform_search_trial
        tasks: Sequence[Task | SearchTrial] = runs if tuning is None else tuning.tasks()
        known = enumerate(_known(task, self.archive) for task in runs) if tuning is None else ()
        settled = {number: outcome for number, outcome in known if outcome is not None}
        left = [number for number in range(len(tasks)) if number not in settled]
        early = tuning is not None or any(task.setting.spec.stop_at_loss is not None for task in runs)
        records: list[Record] = []
        if tell is not None:
            tell(f"{experiment.title} {len(tasks)} runs, those of every setting in a line once they are known:")
        with contextlib.closing(self.executor.run(work, [tasks[number] for number in left])) as performed:
            ended = itertools.chain(settled.items(), ((left[place], outcome) for place, outcome in performed))
            watched = watch(ended, len(tasks), runs, name, progress, settled=len(settled), may_end_early=early)
            for number, outcome in watched:
                if isinstance(outcome, Failure):
                    failures[tasks[number].name] = outcome.error
                elif outcome is not None:
                    records.append(outcome)
                    of_setting = select(records, outcome.arm, outcome.case)
                    if tell is not None and len(of_setting) == len(experiment.seeds):
                        tell(line_of(experiment, of_setting))
                if number not in settled:
                    journal.note(name)
        if experiment.answers == "choice":
            self.keep_winners(self.summary(name, failures))

    def summary(self, name: str, failures: Mapping[str, str] | None = None, *, judged: bool = True) -> Summary:
        """What is known of one experiment; nothing is trained or measured.

        Args:
            name: which.
            failures: runs that failed without leaving a note in their folders, and why.
            judged: as :func:`~flatminima.lab.experiments.summarize` takes it.
        """
        experiment, tuning = self.experiment(name), self.tuning(name)
        if tuning is not None:
            return tuning.summary(failures or {}, self.workers)
        tasks = self.tasks(name)
        state = State.of(tasks, failures or {}, self.archive)
        price = costs.prices(tasks, state.records) if state.left else {}
        left = {task.name for task in state.left}
        unfinished = Unfinished(
            failures=state.failures,
            left=tuple(task.name for task in state.left),
            labels={task.name: task.label for task in tasks if task.name in state.failures or task.name in left},
            seconds_left=sum(costs.seconds(task, price) for task in state.left) / self.workers,
            workers=self.workers,
            ruled_out=state.ruled_out,
        )
        return summarize(experiment, state.records, unfinished, judged=judged)

    def keep_winners(self, summary: Summary) -> None:
        """Keep what a search has decided so far for the experiments that train by it; others decide nothing."""
        if summary.chosen:
            write_winners(self.folder, winners_of(self.experiment(summary.name), summary.chosen))

    def report_finished(self) -> list[Summary]:
        """Report without any run: what is finished, and how many runs are not.

        Returns:
            The summary of every experiment.
        """
        summaries = [self.summary(name) for name in self.names]
        self.report(summaries)
        return summaries

    def report(self, summaries: Sequence[Summary]) -> None:
        """Write the page, and the same as Markdown and as JSON."""
        write_reports(summaries, self.page.with_suffix(""), heading=self.heading, lead=self.lead)


class _Journal:
    """The page while runs go on: as a whole now and then, its JSON after every run."""

    def __init__(self, study: Study, failures: Mapping[str, str]) -> None:
        self._study, self._failures = study, failures
        self._summaries: dict[str, Summary] = {}
        self._reported = time.monotonic()

    def note(self, name: str) -> None:
        """A run of this experiment has ended."""
        names = self._study.names
        whole = time.monotonic() - self._reported > REPORT_SECONDS
        for each in names if whole or not self._summaries else (name,):
            self._summaries[each] = self._study.summary(each, self._failures, judged=whole)
        summaries = [self._summaries[each] for each in names]
        with contextlib.suppress(FlatminimaError):  # a full disk: the last page says so, if it is then
            self._study.keep_winners(self._summaries[name])
            if whole:
                self._reported = time.monotonic()
                self._study.report(summaries)
            else:
                write_json(summaries, self._study.page.with_suffix(""))


def table(summaries: Sequence[Summary]) -> Group:
    """The summaries for a terminal."""
    parts: list[Any] = []
    for summary in summaries:
        parts += [*tables(summary), *(f"• {line}" for line in summary.verdict), progress_line(summary), ""]
        parts += failure_lines(summary)
    return Group(*parts)


@dataclass(frozen=True)
class State:
    """How far tasks are."""

    records: list[Record]
    failures: dict[str, str]
    left: list[Task]
    ruled_out: tuple[str, ...]
    """As :class:`~flatminima.lab.experiments.Unfinished` has it."""

    @classmethod
    def of(cls, tasks: Sequence[Task], failures: Mapping[str, str], archive: Archive) -> State:
        """By what their folders hold, by what is archived, and by failures that left no note."""
        records, failed, left = [], {}, []
        ruled_out: list[str] = []
        for task in tasks:
            known = _known(task, archive)
            if isinstance(known, Failure):
                failed[task.name] = known.error
                ruled_out += [task.setting.name] if task.folder.status == "failed" else []
            elif known is not None:
                records.append(known)
            elif task.name in failures:
                failed[task.name] = failures[task.name]
            else:
                left.append(task)
        return cls(records, failed, left, tuple(dict.fromkeys(ruled_out)))


def _known(task: Task, archive: Archive) -> Record | Failure | None:
    """How a run ended, by its folder or else the archive; None if it is still to be done."""
    try:
        return look_up(task) or archive.of(task)
    except FlatminimaError as error:
        return Failure(task, str(error))
