"""What an experiment is: settings and seeds, trained and measured, as records that tables and figures are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flatminima.errors import FlatminimaError, recorded_warnings
from flatminima.lab.errors import DamagedFileError
from flatminima.lab.runs import Measuring, RunFolder, RunResult, RunSpec, kept_measures, measure_run, train
from flatminima.losses import LOGIT_NORMALIZATION
from flatminima.measures import CATALOGUE, Characterization, jsonable

NORMALIZED = "log_det_fisher_normalized"
"""γ̂ at normalized logits, for minima of unequal training loss."""

INDICATORS = {
    **{name: measure.label.strip() for name, measure in CATALOGUE.items()},
    NORMALIZED: "γ̂ at normalized logits",
    "train_loss": "training loss (no measure: the baseline)",
}
"""Everything that is set beside the test error, with its name in tables."""


OF_RECORD = ("test_error", "validation_error", "train_accuracy")
"""What every minimum has beside indicators."""


@dataclass(frozen=True)
class Record:
    """One minimum in numbers; None where a number is not known or not defined (a singular ξ has no γ̂)."""

    case: str
    """Of the experiment."""
    arm: str
    """How it was trained."""
    seed: int
    """The run's."""
    run: str
    """The run folder's name."""
    test_error: float
    """Fraction of the test images classified wrongly."""
    validation_error: float | None
    """Fraction of the held-out training images classified wrongly; None without such."""
    train_accuracy: float
    """Fraction of the training images classified rightly, confusion set included."""
    indicators: Mapping[str, float | None]
    """By the names of :data:`INDICATORS`, and of measures of the user's own; empty where nothing is measured."""
    seconds: float
    """Wall-clock time of training."""
    warnings: tuple[str, ...]
    """Given while it was measured."""
    environment: Mapping[str, str | int]
    """Versions, device and threads."""
    log_det_fisher_standard_error: float | None = None
    """γ̂'s, over trials."""

    def value(self, quantity: str) -> float:
        """test_error, validation_error, train_accuracy or an indicator; NaN where there is none."""
        found = getattr(self, quantity) if quantity in OF_RECORD else self.indicators.get(quantity)
        return math.nan if found is None else float(found)


@dataclass(frozen=True)
class Setting:
    """One configuration of an experiment."""

    case: str
    """What is varied: a point of a figure's x axis, or a column of a table."""
    arm: str
    """How it is trained: a line of a figure, or a row of a table."""
    spec: RunSpec
    """The run; its seed is the experiment's to choose."""

    @property
    def name(self) -> str:
        """What summaries call it."""
        return f"{self.case} / {self.arm}"


@dataclass(frozen=True)
class Experiment:
    """Settings, each trained with every seed, and the question that they answer."""

    title: str
    """A heading."""
    question: str
    """What it asks, and what the paper answers."""
    answers: Literal["ranking", "comparison", "choice"]
    """Which indicator orders the cases by test error; how the arms differ; or which arm is best on held-out images."""
    factor: str
    """What the cases are."""
    settings: tuple[Setting, ...]
    """Every case with every arm it has."""
    measuring: Measuring | None
    """How minima are measured (None: they are not)."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Every setting is trained once with each."""
    quantity: str = "test_error"
    """What a comparison or a choice compares: test_error, validation_error, or an indicator."""
    contrast: tuple[str, str] | None = None
    """The arms of which a comparison claims that the quantity of the first is less than that of the second."""
    drawn: tuple[str, ...] = ()
    """Quantities that get a figure over the cases each; a comparison tabulates them too."""
    published: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """The paper's mean and standard deviation of the quantity by case and arm (errors in percent)."""
    captured: Mapping[str, bool] = field(default_factory=dict)
    """Whether, says the paper, an indicator follows the test error."""
    name: str = ""
    """As the command line and its page's address call it; a registered experiment's is that of its entry."""

    def __post_init__(self) -> None:
        seen: dict[RunSpec, Setting] = {}
        for setting in self.settings:
            other = seen.setdefault(setting.spec, setting)
            if other is not setting:
                raise FlatminimaError(
                    f"settings {other.arm!r}, {other.case!r} and {setting.arm!r}, {setting.case!r} are the same run: "
                    "leave one out"
                )
        repeated = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if repeated:
            raise FlatminimaError(f"seeds named more than once: {', '.join(map(str, repeated))}")
        if self.contrast is not None and not set(self.contrast) <= set(self.arms):
            raise FlatminimaError(f"contrast {self.contrast} names other arms than {self.arms}")

    @property
    def cases(self) -> list[str]:
        """The cases, in order."""
        return list(dict.fromkeys(setting.case for setting in self.settings))

    @property
    def arms(self) -> list[str]:
        """The arms, in order."""
        return list(dict.fromkeys(setting.arm for setting in self.settings))

    def tasks(self, root: Path, *, by_setting: bool = False) -> list[Task]:
        """Every setting with every seed.

        Args:
            root: where run folders are kept.
            by_setting: settings outermost, so that one after the other is finished; else seeds are, so that an
                experiment cut short has all settings with some of the seeds.
        """
        tasks = [
            Task(replace(setting, spec=replace(setting.spec, seed=seed)), self.measuring, root)
            for seed in self.seeds
            for setting in self.settings
        ]
        width = len(self.settings)
        return [task for first in range(width) for task in tasks[first::width]] if by_setting else tasks


@dataclass(frozen=True)
class Task:
    """One run of an experiment."""

    setting: Setting
    """Its spec with one seed."""
    measuring: Measuring | None
    """How its minimum is measured, if it is."""
    root: Path
    """Where run folders are kept."""

    @property
    def folder(self) -> RunFolder:
        """Where the run is kept."""
        return RunFolder.of(self.root, self.setting.spec)

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return self.folder.path.name

    @property
    def label(self) -> str:
        """Which of the experiment's runs it is."""
        return f"{self.setting.case}, {self.setting.arm}, seed {self.setting.spec.seed}"

    @property
    def ways(self) -> list[Measuring]:
        """How the minimum is measured: as asked, and at normalized logits."""
        if self.measuring is None:
            return []
        return [
            self.measuring,
            replace(self.measuring, logit_normalization=LOGIT_NORMALIZATION, measures=()),
        ]


def perform(task: Task) -> Record:
    """Train (or take up, or find finished) one run and measure its minimum; both are kept in the run folder."""
    result = train(task.setting.spec, task.root, progress=False, wait=True)
    with recorded_warnings() as recorded:
        measured = [measure_run(result.folder, how, progress=False) for how in task.ways]
    return _record(task, result, measured, [str(warning) for warning in recorded])


def look_up(task: Task) -> Record | None:
    """What :func:`perform` would return, if the run folder already holds all of it; nothing is trained or measured.

    Raises:
        FlatminimaError: the run failed before, or the folder holds another; the message says why.
    """
    folder = task.folder
    try:
        result = folder.read_result()
        if result is None:
            return None
        folder.require_spec(task.setting.spec)
    except DamagedFileError:
        return None
    with recorded_warnings() as recorded:
        measured = [kept_measures(result.folder, how) for how in task.ways]
    found = [characterization for characterization in measured if characterization is not None]
    if len(found) < len(measured):
        return None
    return _record(task, result, found, [str(warning) for warning in recorded])


def select(records: Sequence[Record], arm: str | None = None, case: str | None = None) -> list[Record]:
    """The records of one arm, or of one case, or of one setting."""
    return [r for r in records if arm in (None, r.arm) and case in (None, r.case)]


def _record(
    task: Task,
    result: RunResult,
    measured: Sequence[Characterization],
    messages: Sequence[str],
) -> Record:
    record = Record(
        case=task.setting.case,
        arm=task.setting.arm,
        seed=task.setting.spec.seed,
        run=result.folder.name,
        test_error=result.test_error,
        validation_error=result.validation_error,
        train_accuracy=result.train_accuracy,
        indicators={},
        seconds=result.seconds,
        warnings=tuple(dict.fromkeys(messages)),
        environment=dict(result.environment),
    )
    if not measured:
        return record
    plain, normalized = measured
    means = {name: estimate.mean for name, estimate in plain.estimates().items()}
    means[NORMALIZED] = normalized.log_det_fisher.mean
    means["train_loss"] = plain.train_loss
    return replace(
        record,
        indicators={name: jsonable(means.get(name, math.nan)) for name in {**INDICATORS, **means}},
        log_det_fisher_standard_error=jsonable(plain.log_det_fisher.standard_error),
    )
