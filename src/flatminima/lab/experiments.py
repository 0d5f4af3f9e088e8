"""Sets of runs that answer a question: train every spec, measure every minimum, set the measures beside the error."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from flatminima.errors import FlatminimaError, FlatminimaWarning
from flatminima.lab.executors import Executor, Failure, run_all
from flatminima.lab.measuring import Measuring, measure_run
from flatminima.lab.results import RunResult
from flatminima.lab.specs import RunSpec
from flatminima.lab.training import train
from flatminima.losses import LOGIT_NORMALIZATION
from flatminima.measures import MEASURES, Characterization

NORMALIZED = "log_det_fisher_normalized"
"""γ̂ at normalized logits, for minima of unequal training loss."""

INDICATORS = {
    **MEASURES,
    NORMALIZED: "γ̂ at normalized logits",
    "train_loss": "training loss (no measure: the baseline)",
}
"""Everything that is set beside the test error, with its name in tables."""

_BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Task:
    """One run of an experiment: a setting's spec with one seed."""

    setting: str
    spec: RunSpec
    measuring: Measuring
    root: Path


@dataclass(frozen=True)
class Outcome:
    """One trained and measured minimum.

    Attributes:
        setting: the setting's name.
        spec: what was trained.
        result: how training ended.
        characterization: its measures, on the un-augmented training images that keep their own labels.
        normalized: the same at normalized logits.
        warnings: what measuring warned of, one line each.
    """

    setting: str
    spec: RunSpec
    result: RunResult
    characterization: Characterization
    normalized: Characterization
    warnings: tuple[str, ...]

    def indicator(self, name: str) -> float:
        """The value of an entry of :data:`INDICATORS`; NaN where the network has none."""
        if name == NORMALIZED:
            return self.normalized.log_det_fisher.mean
        if name == "train_loss":
            return self.characterization.train_loss
        estimate = self.characterization.estimates().get(name)
        return estimate.mean if estimate is not None else math.nan


def tasks_of(settings: dict[str, RunSpec], seeds: Sequence[int], measuring: Measuring, root: Path) -> list[Task]:
    """Every setting with every seed, seeds outermost: an experiment cut short has all settings with some seeds.

    Raises:
        FlatminimaError: if two settings are the same run.
    """
    for (first, spec), (second, other) in itertools.combinations(settings.items(), 2):
        if spec == other:
            raise FlatminimaError(f"settings {first!r} and {second!r} are the same run: leave one out")
    return [Task(name, replace(spec, seed=seed), measuring, root) for seed in seeds for name, spec in settings.items()]


def perform(task: Task) -> Outcome:
    """Train (or take up, or find finished) one run and measure its minimum; both are kept in the run folder."""
    result = train(task.spec, task.root, progress=False, wait=True)
    at_normalized_logits = replace(task.measuring, logit_normalization=LOGIT_NORMALIZATION, robustness_samples=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FlatminimaWarning)
        characterization = measure_run(result.folder, task.measuring, progress=False)
        normalized = measure_run(result.folder, at_normalized_logits, progress=False)
    lines = tuple(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, FlatminimaWarning)))
    return Outcome(task.setting, task.spec, result, characterization, normalized, lines)


def run_experiment(
    settings: dict[str, RunSpec],
    *,
    seeds: Sequence[int],
    measuring: Measuring,
    root: Path,
    executor: Executor,
    progress: bool = True,
) -> list[Outcome]:
    """Every setting with every seed, trained and measured. Finished runs are found again under ``root``.

    Raises:
        FlatminimaError: if a run failed; the others were carried to their end.
    """
    tasks = tasks_of(settings, seeds, measuring, root)
    found = run_all(perform, tasks, executor, description="training and measuring", progress=progress)
    failures = [outcome for outcome in found if isinstance(outcome, Failure)]
    if failures:
        first = failures[0].task
        raise FlatminimaError(
            f"{len(failures)} of {len(tasks)} runs failed; {first.setting} with seed {first.spec.seed}: "
            f"{failures[0].error}"
        )
    return [outcome for outcome in found if isinstance(outcome, Outcome)]


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's τ between an indicator and the test error, and a percentile bootstrap interval over models.

    Attributes:
        tau: over single models; 1: the indicator orders them as the test error does; NaN where undefined.
        low: 2.5 % quantile of τ over resampled models.
        high: 97.5 % quantile.
        tau_of_settings: τ over the settings' means.
    """

    tau: float
    low: float
    high: float
    tau_of_settings: float


def rank_correlation(outcomes: Sequence[Outcome], indicator: str, *, seed: int = 0) -> RankCorrelation:
    """How well an indicator orders minima by test error (τ-b; Kendall 1945)."""
    values = np.array([outcome.indicator(indicator) for outcome in outcomes])
    errors = np.array([outcome.result.test_error for outcome in outcomes])
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(values), size=(_BOOTSTRAP_SAMPLES, len(values)))
    bootstrap = [_kendall(values[draw], errors[draw]) for draw in draws]
    low, high = np.nanquantile(bootstrap, [0.025, 0.975]) if not np.isnan(bootstrap).all() else (math.nan, math.nan)
    settings = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    member = np.array([settings.index(outcome.setting) for outcome in outcomes])
    means = [(values[member == k].mean(), errors[member == k].mean()) for k in range(len(settings))]
    return RankCorrelation(_kendall(values, errors), float(low), float(high), _kendall(*np.array(means).T))


def _kendall(a: Any, b: Any) -> float:
    return float(stats.kendalltau(a, b).statistic) if np.isfinite(a).all() and len(set(a)) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """A paired difference over seeds: mean, 95 % interval (Student's t), number of pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Sequence[Outcome], second: Sequence[Outcome], value: Callable[[Outcome], float]
) -> Difference:
    """``value`` of ``first`` minus that of ``second``, paired by seed."""
    by_seed = {outcome.spec.seed: outcome for outcome in second}
    differences = [value(outcome) - value(by_seed[outcome.spec.seed]) for outcome in first]
    n, mean = len(differences), float(np.mean(differences))
    margin = float(stats.t.ppf(0.975, n - 1) * stats.sem(differences)) if n > 1 else math.inf
    return Difference(mean, mean - margin, mean + margin, n)
