"""The paper's experiments from end to end: which, in what size, what is left of them; :mod:`.study` runs them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group

from flatminima.errors import FlatminimaError, require_one_of
from flatminima.lab.experiments import (
    EXPERIMENTS,
    PRESETS,
    Archive,
    Experiment,
    Preset,
    Task,
    Tuning,
    Winners,
    build_experiment,
    costs,
    expected,
    read_winners,
    summarize,
    winners_of,
)
from flatminima.lab.jobs import Executor, WorkerPool
from flatminima.lab.names import PresetName, Protocol
from flatminima.lab.reports import counted, duration
from flatminima.lab.runs import selection_of
from flatminima.lab.study import State, Study
from flatminima.tables import Table

_LEADS = {
    "paper": "Networks, data and training are the paper's.",
    "medium": "In the middle: 10,000 CIFAR-10 images, and a network that one core trains in minutes.",
    "small": "In small: CIFAR-10 images, fewer of them, and a smaller network.",
    "digits": "In miniature, on handwritten digits: it shows the machinery, and little about the claims.",
}

_MATCHED = (
    " The runs of a scenario end as soon as they fit their training images equally well, and not after as many epochs: "
    "at unequal training loss a measure that contains it, as γ̂ does, is compared with little else."
)


@dataclass(frozen=True)
class Reproduction(Study):
    """Some of the paper's experiments in one size, and where they are kept."""

    names: tuple[str, ...]
    """Of :data:`~flatminima.lab.experiments.paper.EXPERIMENTS`, in its order: a search before what trains by it."""
    preset: PresetName
    """How large."""
    out: Path
    """Folder; runs and pages of every preset go to a folder of its name there."""
    data: Path | None = None
    """Folder of CIFAR (None: from the Hugging Face hub)."""
    seeds: tuple[int, ...] | None = None
    """Other seeds than the paper's five; the search keeps its one."""
    protocol: Protocol = "paper"
    """When the scenarios' runs end."""
    executor: Executor = WorkerPool(1)  # noqa: RUF009
    """Where runs go."""
    workers: int = 1
    """Runs at once, as far as estimates of time need to know."""
    measures: tuple[str, ...] = ()
    """What is measured beside what the preset says, as in :class:`~flatminima.lab.runs.Measuring`."""
    trials: int | None = None
    """Search by this many trials of Optuna for every network (None: over the whole grid)."""
    records: Path | None = None
    """Folder of experiments' JSON: the runs they hold are finished, though their folders are gone."""

    def __post_init__(self) -> None:
        for name in self.names:
            require_one_of("experiment", name, EXPERIMENTS)
        object.__setattr__(self, "names", tuple(name for name in EXPERIMENTS if name in self.names))
        scenarios = [name for name in self.names if name.startswith("scenario")]
        if self.protocol == "matched" and len(scenarios) < len(self.names):
            others = ", ".join(name for name in self.names if name not in scenarios)
            raise FlatminimaError(f"the matched protocol is the scenarios': leave {others} out, or the protocol")
        if self.trials is not None and "search" not in self.names:
            raise FlatminimaError("trials are the search's: add search to the experiments, or leave the trials out")
        if self.trials is not None and self.records is not None:
            raise FlatminimaError("a search by trials goes on from its own file alone: leave out trials or records")
        if self.measures and not any(EXPERIMENTS[name](self._preset, {}).measuring for name in self.names):
            raise FlatminimaError(
                f"nothing is measured in {' and '.join(self.names)}, where errors alone are compared: add a scenario "
                "or table-2, or leave the measures out"
            )
        self.archive  # noqa: B018 (refused now, not after the experiments before it)
        selection_of(self._preset.measuring)  # refuses what cannot be measured
        self.tuning("search")  # refused now, not after the experiments before it

    @property
    def folder(self) -> Path:
        """Where the preset's runs and pages are; those of another protocol than the paper's beside them."""
        return self.out / (self.preset if self.protocol == "paper" else f"{self.preset}-{self.protocol}")

    @property
    def page(self) -> Path:
        """The page of these experiments."""
        name = "all" if set(self.names) == set(EXPERIMENTS) else "+".join(self.names)
        return self.folder / f"{name}.html"

    @property
    def heading(self) -> str:
        """The page's."""
        protocol = "" if self.protocol == "paper" else ", at matched fit"
        return f"The paper's experiments, {self.preset}{protocol}"

    @property
    def lead(self) -> str:
        """What the page begins with."""
        return _LEADS[self.preset] + ("" if self.protocol == "paper" else _MATCHED)

    def experiment(self, name: str) -> Experiment:
        """One of them, with what the search has chosen so far."""
        chosen = {**self._archived_winners, **read_winners(self.folder)}
        return build_experiment(name, self._preset, chosen=chosen, data=self.data, seeds=self.seeds)

    @functools.cached_property
    def archive(self) -> Archive:
        """What the records hold."""
        return Archive() if self.records is None else Archive.read(self.records)

    @functools.cached_property
    def _archived_winners(self) -> Winners:
        """What the search has chosen by the records."""
        if self.records is None:
            return {}
        search = build_experiment("search", self._preset, chosen={}, data=self.data, seeds=None)
        found = map(self.archive.of, search.tasks(self.folder / "runs"))
        again = summarize(search, [record for record in found if record is not None])
        return winners_of(search, {**self.archive.chosen(search), **again.chosen})

    @property
    def _preset(self) -> Preset:
        found = PRESETS[self.preset].under(self.protocol)
        more = tuple(dict.fromkeys((*found.measuring.measures, *self.measures)))
        return replace(found, measuring=replace(found.measuring, measures=more))

    def tuning(self, name: str) -> Tuning | None:
        """How an experiment is searched by trials, if it is."""
        if self.trials is None or name != "search":
            return None
        return Tuning(self.experiment(name), self.trials, self.folder)

    def plan(self) -> list[Planned]:
        """What would run, on what, for how long; a few updates of every network are timed for it."""
        planned: dict[tuple[str, str, str], Planned] = {}
        trained: set[str] = set()  # experiments share runs
        for name in self.names:
            experiment, tuning = self.experiment(name), self.tuning(name)
            if tuning is not None:
                planned |= {(name, row.subject, row.training): row for row in _planned_trials(tuning)}
                continue
            tasks = self.tasks(name)
            state = State.of(tasks, {}, self.archive)
            price = costs.prices(tasks, state.records)
            for task in tasks:
                row = planned.setdefault((name, *_line(experiment, task)), Planned(name, *_line(experiment, task)))
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
    statuses, rows = tuning.statuses({}), dict[str, Planned]()
    for status in statuses:
        subject, settings = _line(tuning.grid, status.task)
        rows.setdefault(subject, Planned(tuning.grid.name, subject, f"at most, of {settings}")).runs += 1
    for status, seconds in expected(statuses):
        row = rows[_line(tuning.grid, status.task)[0]]
        row.left += 1
        row.passes += status.cost
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


def _line(experiment: Experiment, task: Task) -> tuple[str, str]:
    """The line of the plan that a task belongs to."""
    setting = task.setting
    subject = f"{setting.spec.model}, {setting.spec.data}"
    if experiment.answers == "choice":
        return subject, f"{len(experiment.arms)} settings"
    return subject, setting.arm
