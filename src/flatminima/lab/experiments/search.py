"""The search by Optuna (extra ``search``): fewer runs than the grid, the next chosen by the last, hopeless ones pruned.

A trial is one of the grid's runs, in the folder that the grid would train it in, and no two trials are the same. So
what a trial finished the grid need not train, nor a trial what the grid finished; and a pruned run is an unfinished
one, which goes on from its resume point should the grid ask for it.

The study is a file, OUT/PRESET/search/optuna.db: whatever is killed, the same command makes of it what was asked. A
trial's draws follow from the seed and its number, so that with one worker all of it is the same in one sitting or many.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatminima.errors import FlatminimaError, first_line
from flatminima.lab.errors import TrainingStopped
from flatminima.lab.experiments import costs
from flatminima.lab.experiments.analysis import summarize
from flatminima.lab.experiments.experiment import Experiment, Record, Task, look_up, perform
from flatminima.lab.experiments.summary import Summary, TrialState, TrialSummary, Unfinished
from flatminima.lab.runs import RegularizerSpec, Stop, train
from flatminima.lab.storage import digest_of, locked

if TYPE_CHECKING:
    import optuna

HYPER_PARAMETERS = ("beta", "num_sub_batches", "max_grad_norm")
"""What is searched for, β, M and τ, each among the grid's values."""

RUNGS = tuple(eighth / 8 for eighth in range(2, 8))
"""Where a run is evaluated on the held-out images, and pruned if its best error so far is above the median of the
finished ones', as fractions of its epochs. Not in the first quarter, when errors say little.

These errors are for the pruner alone and stay in the study. Evaluating changes nothing in a run, so they are no part of
what it is, as ``evaluate_every`` is, and a trial's run is the grid's to the bit."""

STARTUP_TRIALS = 10
"""Settings that are drawn at random before earlier trials decide (Optuna's own default)."""

STARTUP_RUNS = 5
"""Runs that must be finished before one is pruned (Optuna's own default)."""

# With Optuna's 24 the sampler hardly ever proposes but one setting, which has had its trial; with 4 it proposes others
# that are as good. On functions like the paper's grid, 20 trials then found the second best of 96, and at random the
# sixth.
_CANDIDATES = 4

_PROPOSALS = 20  # until one is new


@dataclass(frozen=True)
class Tuning:
    """A search by trials instead of the whole grid.

    Raises:
        FlatminimaError: no trial is asked for, or Optuna is not installed.
    """

    grid: Experiment
    """Every setting that there is, by cases."""
    trials: int
    """How many each case gets; no more than it has settings."""
    folder: Path
    """Where the runs and the study are kept."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise FlatminimaError(f"a search needs at least one trial, got {self.trials}")
        if importlib.util.find_spec("optuna") is None:
            raise FlatminimaError("a search by trials needs optuna: pip install 'flatminima[search]'")

    @property
    def experiment(self) -> Experiment:
        """The grid's experiment, which says that it is searched by trials."""
        settings = len(self._cases[0].settings)
        trials = min(self.trials, settings)
        by_errors = f"the first {STARTUP_TRIALS} drawn at random, the others by the errors so far"
        how = (
            f"Optuna tries {trials} of the grid's {settings} settings, "
            f"{by_errors if trials > STARTUP_TRIALS else 'drawn at random'}. From a quarter of its epochs on, a run "
            f"whose error is above the median of the finished ones at that time is pruned, once {STARTUP_RUNS} are "
            "finished."
        )
        return replace(self.grid, question=f"{self.grid.question} {how}")

    def tasks(self) -> list[SearchTrial]:
        """Every trial, those that have ended among them; the first of every case before the second of any."""
        for case in self._cases:
            case.create()
        return self._trials

    def statuses(self, failures: Mapping[str, str]) -> list[TrialStatus]:
        """How far every trial is; nothing is trained.

        Args:
            failures: trials that failed without leaving a note in their run folders, and why.
        """
        made = {case.name: case.made() for case in self._cases}
        return [
            trial.status(made[trial.case.name], failures.get(trial.name))
            for trial in sorted(self._trials, key=lambda trial: self.grid.cases.index(trial.case.name))
        ]

    def summary(self, failures: Mapping[str, str], workers: int) -> Summary:
        """What is known so far; nothing is trained.

        Args:
            failures: as :meth:`statuses` takes them.
            workers: trials at once, for the time left.
        """
        statuses = self.statuses(failures)
        unfinished = Unfinished(
            failures={status.trial.name: status.failure for status in statuses if status.failure is not None},
            left=tuple(status.trial.name for status in statuses if status.state == "left"),
            labels={
                status.trial.name: status.task.label if status.begun else "not begun"
                for status in statuses
                if status.state in ("failed", "left")
            },
            seconds_left=sum(seconds for _, seconds in expected(statuses)) / workers,
            workers=workers,
            ruled_out=tuple(
                status.task.setting.name
                for status in statuses
                if status.state == "failed" and status.begun and status.task.folder.status == "failed"
            ),
        )
        records = [status.record for status in statuses if status.record is not None]
        return summarize(self.experiment, records, unfinished, [status.summary() for status in statuses])

    @property
    def _cases(self) -> list[Case]:
        tasks = self.grid.tasks(self.folder / "runs")
        return [
            Case(name, tuple(task for task in tasks if task.setting.case == name), self.folder / "search")
            for name in self.grid.cases
        ]

    @property
    def _trials(self) -> list[SearchTrial]:
        cases = self._cases
        return [
            SearchTrial(case, number) for number in range(self.trials) for case in cases if number < len(case.settings)
        ]


@dataclass(frozen=True)
class Case:
    """A case of the experiment, and its study."""

    name: str
    """Network and data."""
    settings: tuple[Task, ...]
    """The grid's runs."""
    folder: Path
    """Where studies are kept."""

    @functools.cached_property
    def key(self) -> str:
        """A digest of the settings: a grid of other runs is another study."""
        identities = [task.setting.spec.identity() for task in self.settings]
        return digest_of(json.dumps(identities, sort_keys=True).encode())[:12]

    def create(self) -> None:
        """Make the study, if it is not there."""
        import optuna

        with self._lock("study"), self._storage() as storage:
            optuna.create_study(storage=storage, study_name=self._study_name, load_if_exists=True)

    def made(self) -> list[optuna.trial.FrozenTrial]:
        """The trials begun so far, by number."""
        if not self._path.exists():
            return []
        with self._storage() as storage:
            try:
                return self._study(storage).get_trials(deepcopy=False)
            except KeyError:  # only other grids' are there
                return []

    @contextlib.contextmanager
    def attempt(self, number: int) -> Iterator[optuna.Trial]:
        """A trial, begun now or taken up again; another process that wants it waits."""
        import optuna

        with self._lock(str(number)), self._storage() as storage:
            study = self._study(storage)
            with self._lock("study"):
                while len(made := study.get_trials(deepcopy=False)) <= number:
                    self._propose(self._study(storage), len(made))  # a sampler may not see what is new to a study
            yield optuna.Trial(study, made[number]._trial_id)  # `study.ask` would begin another one

    def task(self, parameters: dict[str, Any]) -> Task:
        """The run with these hyper-parameters."""
        (found,) = (task for task in self.settings if _parameters(task) == parameters)
        return found

    def _propose(self, study: optuna.Study, number: int) -> None:
        """Begin the next trial; at once and with its parameters, so that no kill leaves a half of it."""
        import optuna

        seed = int(digest_of(f"{self._seed} {self.name} {number}".encode())[:8], base=16)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS,
            n_ei_candidates=_CANDIDATES,
            multivariate=False,
            constant_liar=True,  # a running trial counts as a bad one, so that workers look in different places
            seed=seed,
        )
        space = self._space()
        blank = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
        taken = [trial.params for trial in study.get_trials(deepcopy=False)]
        free = [parameters for parameters in map(_parameters, self.settings) if parameters not in taken]
        for _ in range(_PROPOSALS):
            proposed = {name: sampler.sample_independent(study, blank, name, space[name]) for name in space}
            if proposed in free:
                break
        else:
            proposed = random.Random(seed).choice(free)
        study.add_trial(
            optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, params=proposed, distributions=dict(space))
        )

    def _space(self) -> dict[str, optuna.distributions.BaseDistribution]:
        import optuna

        values = [_parameters(task) for task in self.settings]
        return {
            name: optuna.distributions.CategoricalDistribution(list(dict.fromkeys(value[name] for value in values)))
            for name in HYPER_PARAMETERS
        }

    @property
    def _seed(self) -> int:
        return self.settings[0].setting.spec.seed

    @property
    def _study_name(self) -> str:
        return f"{self.name} {self.key}"

    @property
    def _path(self) -> Path:
        return self.folder / "optuna.db"

    def _study(self, storage: optuna.storages.BaseStorage) -> optuna.Study:
        import optuna

        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_RUNS)
        return optuna.load_study(storage=storage, study_name=self._study_name, pruner=pruner)

    def _lock(self, what: str) -> AbstractContextManager[None]:
        return locked(self.folder / f"{self.key}-{what}.lock")

    @contextlib.contextmanager
    def _storage(self) -> Iterator[optuna.storages.RDBStorage]:
        import optuna
        import sqlalchemy.exc

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{self._path}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            try:
                yield storage
            finally:
                storage.remove_session()
                storage.engine.dispose()
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.DatabaseError) as error:
            reason = first_line(error.__cause__ or error)
            raise FlatminimaError(
                f"cannot use {self._path}: {reason}; without it the search starts anew, and finished runs are kept"
            ) from None


@dataclass(frozen=True)
class SearchTrial:
    """One trial, for an executor."""

    case: Case
    """Of what."""
    number: int
    """Counted from 0."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return f"{self.case.name}, trial {self.number}"

    def status(self, made: Sequence[optuna.trial.FrozenTrial], failure: str | None) -> TrialStatus:
        """How far it is.

        Args:
            made: the case's trials begun so far.
            failure: why it failed, if that left no note in the run folder.
        """
        if self.number >= len(made):
            state: TrialState = "left" if failure is None else "failed"
            return TrialStatus(self, state, self.case.settings[0], begun=False, failure=failure)
        trial = made[self.number]
        task = self.case.task(trial.params)
        if trial.state.name == "PRUNED":
            step = trial.last_step
            assert step is not None
            return TrialStatus(self, "pruned", task, epoch=step, validation_error=trial.intermediate_values[step])
        try:
            record = look_up(task) if trial.state.is_finished() else None
        except FlatminimaError as error:
            return TrialStatus(self, "failed", task, failure=str(error))
        if record is not None:
            return TrialStatus(self, "finished", task, record=record, validation_error=record.validation_error)
        return TrialStatus(self, "left" if failure is None else "failed", task, failure=failure)


@dataclass(frozen=True)
class TrialStatus:
    """How far a trial is."""

    trial: SearchTrial
    """Which."""
    state: TrialState
    """Left are those that are not begun, that go on, and whose run folder is gone."""
    task: Task
    """Its run; before it is begun some other of the case, which costs the same."""
    begun: bool = True
    """Whether its run is known."""
    record: Record | None = None
    """Its minimum, if it is finished."""
    failure: str | None = None
    """Why it failed, if it did."""
    epoch: int | None = None
    """Where it was pruned, if it was."""
    validation_error: float | None = None
    """At the end, or where it was pruned."""

    @property
    def cost(self) -> float:
        """What the trial takes from its beginning if it is not pruned, in forward-backwards of one image."""
        return costs.cost(self.task).total + len(RUNGS) * costs.FORWARD * self.task.setting.spec.validation

    def summary(self) -> TrialSummary:
        """For the experiment's summary."""
        arm = self.task.setting.arm if self.begun else None
        return TrialSummary(self.trial.case.name, self.trial.number, arm, self.state, self.epoch, self.validation_error)


def expected(statuses: Sequence[TrialStatus]) -> list[tuple[TrialStatus, float]]:
    """The trials left, and the seconds of one worker that each takes if it is not pruned."""
    left = [status for status in statuses if status.state == "left"]
    kinds = {costs.kind(status.task) for status in left}
    records = [status.record for status in statuses if status.record is not None]
    price = costs.prices([status.task for status in statuses if costs.kind(status.task) in kinds], records)
    return [(status, status.cost * price[costs.kind(status.task)]) for status in left]


def perform_search_trial(trial: SearchTrial) -> Record | None:
    """Begin a trial (or take it up, or find it ended) and train its run to the end, or until it is pruned.

    Returns:
        The minimum's record; None for a pruned trial.

    Raises:
        FlatminimaError: the run failed. If it would fail again, so has the trial; else it is still to be done.
    """
    with trial.case.attempt(trial.number) as attempt:
        study, frozen = attempt.study, attempt.study.get_trials(deepcopy=False)[trial.number]
        task = trial.case.task(frozen.params)
        if frozen.state.name == "PRUNED":
            return None
        if not frozen.state.is_finished():
            try:
                result = train(task.setting.spec, task.root, progress=False, wait=True, stop=_pruning(attempt))
            except TrainingStopped:
                study.tell(attempt, state=type(frozen.state).PRUNED)
                return None
            except FlatminimaError:
                if task.folder.status == "failed":
                    study.tell(attempt, state=type(frozen.state).FAIL)
                raise
            for record in task.folder.read_history():  # of a run that the grid has finished, what is known
                if record.epoch in rungs(result.epochs) and record.validation_error is not None:
                    _report(attempt, record.epoch, record.validation_error)
            study.tell(attempt, result.validation_error)
        return perform(task)


def rungs(epochs: int) -> set[int]:
    """The epochs of a run after which it may be pruned; the last is none."""
    return {math.ceil(fraction * epochs) for fraction in RUNGS} - {epochs}


def _pruning(attempt: optuna.Trial) -> Stop:
    """Report the errors at rungs, and stop where the pruner says so.

    What was reported before a kill is the same when it comes again, and a rung below another was passed before.
    """

    def stop(epoch: int, epochs: int, validation_error: Any) -> bool:
        reported = _reported(attempt)
        if epoch not in rungs(epochs) or epoch < max(reported, default=0):
            return False
        if epoch not in reported:
            _report(attempt, epoch, validation_error())
        return attempt.should_prune()

    return stop


def _report(attempt: optuna.Trial, epoch: int, error: float) -> None:
    if epoch not in _reported(attempt):
        attempt.report(error, epoch)


def _reported(attempt: optuna.Trial) -> dict[int, float]:
    trial = attempt.study.get_trials(deepcopy=False)[attempt.number]
    return trial.intermediate_values


def _parameters(task: Task) -> dict[str, Any]:
    regularizer = task.setting.spec.regularizer
    assert isinstance(regularizer, RegularizerSpec)
    return {name: getattr(regularizer, name) for name in HYPER_PARAMETERS}
