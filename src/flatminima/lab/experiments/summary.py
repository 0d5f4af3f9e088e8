"""What an experiment shows so far, as plain data, complete when made; :mod:`.analysis` makes it from records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flatminima.lab.experiments.experiment import INDICATORS, Record
from flatminima.lab.experiments.statistics import Difference, RankCorrelation, Spread
from flatminima.lab.runs import Measuring
from flatminima.protocols import Evaluation

RIVALS = ("log_det_fisher", "spectral_radius", "frobenius_norm", "robustness")
"""The measures of the paper's figures."""

SHORT_NAMES = {
    **INDICATORS,
    "log_det_fisher": "γ̂",
    "frobenius_norm": "Frobenius²",
    "fisher_frobenius_norm": "Frobenius² (Fisher)",
    "fisher_trace": "trace",
    "log_det_fisher_normalized": "γ̂, normalized",
    "train_loss": "training loss",
    "test_error": "test error",
    "validation_error": "validation error",
}
"""Column headings."""

TrialState = Literal["finished", "pruned", "failed", "left"]


@dataclass(frozen=True)
class SettingMeans:
    """One setting's quantities over its seeds."""

    case: str
    arm: str
    runs: int
    """How many there are so far."""
    quantities: Mapping[str, Spread | None]
    """Mean and deviation by name; None where a run lacks the quantity, or there is none."""


@dataclass(frozen=True)
class Contrast(Difference):
    """One arm minus another, paired by seed."""

    arm: str
    against: str
    case: str | None = None
    """In which case; None: in all of them, paired by case and seed."""


@dataclass(frozen=True)
class Published:
    """What the paper says of one setting."""

    case: str
    arm: str
    mean: float
    """Errors in percent."""
    std: float


@dataclass(frozen=True)
class TrialSummary:
    """How far a trial of a search is."""

    case: str
    trial: int
    """Counted from 0."""
    arm: str | None
    """Its setting; None before it is begun."""
    state: TrialState
    epoch: int | None
    """Where it was pruned, if it was."""
    validation_error: float | None
    """At the end, or where it was pruned."""


@dataclass(frozen=True)
class Unfinished:
    """The runs that have no record."""

    failures: Mapping[str, str] = field(default_factory=dict)
    """Why runs failed, by their names."""
    left: tuple[str, ...] = ()
    """Names of the runs still to come."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Which of the experiment's runs they are, failed and left, by their names."""
    seconds_left: float = 0.0
    """How long those that are left will take, about."""
    workers: int = 1
    """With so many at once."""
    ruled_out: tuple[str, ...] = ()
    """Every "case / arm" of which a run failed and would fail again, as training that diverges does."""


@dataclass(frozen=True)
class Summary:
    """One experiment and what its records show so far; its JSON is what ``--json`` prints and results/ keeps."""

    name: str
    title: str
    question: str
    answers: Literal["ranking", "comparison", "choice"]
    factor: str
    """What the cases are."""
    quantity: str
    """What is compared."""
    cases: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    specs: Mapping[str, Mapping[str, Any]]
    """What each "case / arm" is trained by."""
    measuring: Measuring | None
    published: tuple[Published, ...]
    captured: Mapping[str, bool]
    """Whether, says the paper, an indicator follows the test error."""
    records: tuple[Record, ...]
    """The finished minima."""
    failures: Mapping[str, str]
    """Why runs failed, by their names."""
    left: tuple[str, ...]
    """Names of the runs still to come."""
    means: tuple[SettingMeans, ...]
    """Every case with every arm."""
    seconds_left: float
    """How long the runs that are left will take, about."""
    workers: int
    """With so many at once."""
    verdict: tuple[str, ...]
    """What the numbers say, in sentences."""
    unfinished: Mapping[str, str] = field(default_factory=dict)
    """Which of the experiment's runs the failed ones and those left are, by their names."""
    contrast: tuple[str, str] | None = None
    """The arms of a comparison's claim: the first has less of the quantity than the second."""
    drawn: tuple[str, ...] = ()
    """Quantities with a figure over the cases."""
    correlations: Mapping[str, RankCorrelation] = field(default_factory=dict)
    """A ranking's, by indicator."""
    evaluation: Evaluation | None = None
    """What the protocols say of a ranking's measures."""
    differences: tuple[Contrast, ...] = ()
    """A comparison's, by case: the contrast's first arm minus every other, and all others minus its second."""
    pooled: tuple[Contrast, ...] = ()
    """Likewise, over all cases."""
    beside: Mapping[str, tuple[Contrast, ...]] = field(default_factory=dict)
    """Differences in further quantities, those drawn."""
    trials: tuple[TrialSummary, ...] | None = None
    """How far every trial is, if a choice is searched for by trials instead of over all settings."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """A choice's best arm by case, where it is known."""
    ruled_out: tuple[str, ...] = ()
    """Every "case / arm" of which a run failed and would fail again: a choice counts it as the worst."""
