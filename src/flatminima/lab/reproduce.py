"""The paper's experiments from end to end: plan, run, report. Whatever is finished is kept, and never done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from flatminima.errors import FlatminimaError
from flatminima.lab.data import load_data
from flatminima.lab.experiments import (
    EXPERIMENTS,
    PRESETS,
    Experiment,
    PresetName,
    Record,
    Task,
    Trial,
    Tuning,
    build_experiment,
    costs,
    expected,
    look_up,
    perform,
    perform_trial,
    summarize,
)
from flatminima.lab.jobs import Executor, Failure, Processes
from flatminima.lab.reports import Table, counted, duration, failed, progress, tables, watch, write_reports, write_text
from flatminima.lab.runs import RegularizerSpec

_CHOSEN = "chosen.json"
_REPORT_SECONDS = 60.0


@dataclass(frozen=True)
class Reproduction:
    """Some of the paper's experiments in one size, and where they are kept."""

    names: tuple[str, ...]
    """Of :data:`~flatminima.lab.experiments.paper.EXPERIMENTS`."""
    preset: PresetName
    """How large."""
    out: Path
    """Folder; runs and pages of every preset go to a folder of its name there."""
    data: Path | None = None
    """Folder of CIFAR (None: from the Hugging Face hub)."""
    seeds: tuple[int, ...] | None = None
    """Other seeds than the paper's five; the search keeps its one."""
    executor: Executor = Processes(1)  # noqa: RUF009
    """Where runs go."""
    workers: int = 1
    """Runs at once, as far as estimates of time need to know."""
    trials: int | None = None
    """Search by this many trials of Optuna for every network (None: over the whole grid)."""

    def __post_init__(self) -> None:
        if self.trials is not None and "search" not in self.names:
            raise FlatminimaError("trials are the search's: add search to the experiments, or leave the trials out")
        self.tuning("search")  # refused now, not after the experiments before it

    @property
    def folder(self) -> Path:
        """Where the preset's runs and pages are."""
        return self.out / self.preset

    @property
    def page(self) -> Path:
        """The page of these experiments."""
        name = "all" if set(self.names) == set(EXPERIMENTS) else "+".join(self.names)
        return self.folder / f"{name}.html"

    def experiment(self, name: str) -> Experiment:
        """One of them, with what the search has chosen so far."""
        chosen = _read_chosen(self.folder)
        return build_experiment(name, PRESETS[self.preset], chosen=chosen, data=self.data, seeds=self.seeds)

    def tuning(self, name: str) -> Tuning | None:
        """How an experiment is searched by trials, if it is."""
        if self.trials is None or name != "search":
            return None
        return Tuning(self.experiment(name), self.trials, self.folder)

    def run(self, *, progress: bool = True) -> list[dict[str, Any]]:
        """Train and measure what is not yet, and report; a failed run is reported and the others go on.

        Returns:
            The summary of every experiment.

        Raises:
            FlatminimaError: the data cannot be loaded.
        """
        used = {setting.spec.source for name in self.names for setting in self.experiment(name).settings}
        for source in sorted(used):
            load_data(source)  # now, and not in every run: what is wrong is said once, and what is slow is done once
        failures: dict[str, str] = {}
        try:
            for name in self.names:
                self._run(name, failures, progress)
        finally:
            summaries = [self.summary(name, failures) for name in self.names]
            self.report(summaries)
        return summaries

    def _run(self, name: str, failures: dict[str, str], progress: bool) -> None:
        """One experiment; the page is brought up to date now and then."""
        asked, reported = self.experiment(name), time.monotonic()
        tuning, runs = self.tuning(name), asked.tasks(self.folder / "runs")
        work: Callable[[Any], Any] = perform if tuning is None else perform_trial
        tasks: Sequence[Task | Trial] = runs if tuning is None else tuning.tasks()
        with contextlib.closing(self.executor.run(work, tasks)) as ended:
            for number, outcome in watch(ended, len(tasks), runs, name, progress):
                if isinstance(outcome, Failure):
                    failures[tasks[number].name] = outcome.error
                if time.monotonic() - reported > _REPORT_SECONDS:
                    with contextlib.suppress(FlatminimaError):  # a full disk: the last page says so, if it is then
                        self.report([self.summary(each, failures) for each in self.names])
                    reported = time.monotonic()
        if asked.answers == "choice":
            _write_chosen(self.folder, asked, self.summary(name, failures)["chosen"])

    def summary(self, name: str, failures: dict[str, str] | None = None) -> dict[str, Any]:
        """What is known of one experiment; nothing is trained or measured.

        Args:
            name: which.
            failures: runs that failed without leaving a note in their folders, and why.
        """
        asked, tuning = self.experiment(name), self.tuning(name)
        if tuning is not None:
            return tuning.summary(failures or {}, self.workers)
        tasks = asked.tasks(self.folder / "runs")
        state = _State.of(tasks, failures or {})
        summary = summarize(asked, state.records, state.failures, [task.name for task in state.left])
        summary["unfinished"] = {
            task.name: task.label for task in tasks if task.name in state.failures or task.name in summary["left"]
        }
        price = costs.prices(tasks, state.records) if state.left else {}
        summary["seconds_left"] = sum(costs.seconds(task, price) for task in state.left) / self.workers
        summary["workers"] = self.workers
        return summary

    def report(self, summaries: Sequence[dict[str, Any]]) -> None:
        """Write the page, and the same as Markdown and as JSON."""
        lead = {
            "paper": "Networks, data and training are the paper's.",
            "small": "In small: CIFAR-10 images, fewer of them, and a smaller network.",
            "digits": "In miniature, on handwritten digits: it shows the machinery, and little about the claims.",
        }
        write_reports(summaries, self.page.with_suffix(""), preset=self.preset, lead=lead[self.preset])

    def plan(self) -> list[Planned]:
        """What would run, on what, for how long; a few updates of every network are timed for it."""
        planned: dict[tuple[str, str, str], Planned] = {}
        trained: set[str] = set()  # experiments share runs
        for name in self.names:
            asked, tuning = self.experiment(name), self.tuning(name)
            if tuning is not None:
                planned |= {(name, row.subject, row.training): row for row in _planned_trials(tuning)}
                continue
            tasks = asked.tasks(self.folder / "runs")
            state = _State.of(tasks, {})
            price = costs.prices(tasks, state.records)
            for task in tasks:
                row = planned.setdefault((name, *_line(asked, task)), Planned(name, *_line(asked, task)))
                row.runs += 1
                if task in state.left:
                    known = task.folder.path.name in trained
                    row.left += 1
                    row.passes += costs.remaining(task, trained=known).total
                    row.seconds += costs.seconds(task, price, trained=known)
                trained.add(task.folder.path.name)
        return list(planned.values())


@dataclass
class Planned:
    """Some of an experiment's runs before they run."""

    experiment: str
    subject: str
    """Network and data."""
    training: str
    """How they are trained."""
    runs: int = 0
    """How many there are."""
    left: int = 0
    """How many are not finished."""
    passes: float = 0.0
    """What those cost, in forward-backwards of one image."""
    seconds: float = 0.0
    """And in seconds of one worker."""


def _planned_trials(tuning: Tuning) -> list[Planned]:
    """What a search by trials takes at most: without pruning."""
    progress, rows = tuning.progress({}), dict[str, Planned]()
    for trial in progress:
        subject, settings = _line(tuning.grid, trial.task)
        rows.setdefault(subject, Planned(tuning.grid.name, subject, f"at most, of {settings}")).runs += 1
    for trial, seconds in expected(progress):
        row = rows[_line(tuning.grid, trial.task)[0]]
        row.left += 1
        row.passes += trial.cost
        row.seconds += seconds
    return list(rows.values())


def plan_table(planned: Sequence[Planned], workers: int) -> Group:
    """The plan for a terminal."""
    header = ("experiment", "network, data", "training", "runs", "left", "forward-backwards", "one worker's time")
    rows = [
        (p.experiment, p.subject, p.training, str(p.runs), str(p.left), f"{p.passes:.2g}", duration(p.seconds))
        for p in planned
    ]
    left, passes, seconds = (sum(getattr(p, name) for p in planned) for name in ("left", "passes", "seconds"))
    total = (
        f"{left} runs are left: {passes:.2g} forward-backwards of one image, about {duration(seconds / workers)} with "
        f"{counted(workers, 'worker')} (estimated; a regularized update counts 2 to 6, SAM's 2, measuring included)."
    )
    return Group(Table("What would run", header, tuple(rows)), total)


def _line(asked: Experiment, task: Task) -> tuple[str, str]:
    """The line of the plan that a task belongs to."""
    setting = task.setting
    subject = f"{setting.spec.model}, {setting.spec.data}"
    if asked.answers == "choice":
        return subject, f"{len(asked.arms)} settings"
    return subject, setting.arm


def table(summaries: Sequence[dict[str, Any]]) -> Group:
    """The summaries for a terminal."""
    parts: list[Any] = []
    for summary in summaries:
        parts += [*tables(summary), *(f"• {line}" for line in summary["verdict"]), progress(summary), ""]
        parts += failed(summary)
    return Group(*parts)


@dataclass(frozen=True)
class _State:
    """How far tasks are."""

    records: list[Record]
    failures: dict[str, str]
    left: list[Task]

    @classmethod
    def of(cls, tasks: Sequence[Task], failures: dict[str, str]) -> _State:
        """By what their folders hold, and by failures that left no note there."""
        records, failed, left = [], {}, []
        for task in tasks:
            run = task.folder.path.name
            try:
                record = look_up(task)
            except FlatminimaError as error:
                failed[run] = str(error)
                continue
            if record is not None:
                records.append(record)
            elif run in failures:
                failed[run] = failures[run]
            else:
                left.append(task)
        return cls(records, failed, left)


def _write_chosen(folder: Path, search: Experiment, chosen: dict[str, str]) -> None:
    """Keep the winners of a search for the tables."""
    specs = {(setting.case, setting.arm): setting.spec.regularizer for setting in search.settings}
    values = {case: dataclasses.asdict(specs[case, arm]) for case, arm in chosen.items()}  # type: ignore[arg-type]
    write_text(folder / _CHOSEN, json.dumps(values, indent=1) + "\n")


def _read_chosen(folder: Path) -> dict[str, RegularizerSpec]:
    path = folder / _CHOSEN
    if not path.exists():
        return {}
    try:
        return {
            case: RegularizerSpec(**values) for case, values in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (ValueError, TypeError, AttributeError):
        raise FlatminimaError(f"{path} is damaged: delete it, and run the search again") from None
