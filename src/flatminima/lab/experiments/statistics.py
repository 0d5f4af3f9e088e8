"""Statistics over trained minima: means, differences paired by seed, and rank correlation in short."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
from pydantic import BeforeValidator
from scipy import stats

from flatminima.protocols import Evidence, Finding

Key = TypeVar("Key", bound=Hashable)

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that JSON has as null where it is not finite; null is read as NaN."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (NaN for a single value) of ``count`` values."""

    mean: Number
    std: Number
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of at least one value."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), deviation, len(values))


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's τ between an indicator and the test error, in short; the rest is in the summary's evaluation.

    Attributes:
        tau: over single minima; 1: the indicator orders them as the test error does; NaN where undefined.
        low: lower end of its 95 % bootstrap interval; NaN where there is none.
        high: upper end.
        tau_of_settings: τ over the settings' means.
    """

    tau: Number
    low: Number
    high: Number
    tau_of_settings: Number

    @property
    def defined(self) -> bool:
        """Whether τ over minima is a number."""
        return not math.isnan(self.tau)


def rank_correlation(evidence: Evidence) -> RankCorrelation:
    """That of one measure."""
    tau, of_settings = evidence.kendall, evidence.kendall_of_settings
    low, high = tau.interval or (math.nan, math.nan)
    return RankCorrelation(_number_or_nan(tau), low, high, _number_or_nan(of_settings))


def _number_or_nan(finding: Finding) -> float:
    return math.nan if finding.value is None else finding.value


@dataclass(frozen=True)
class Difference:
    """A difference paired by seed.

    Attributes:
        mean: its mean.
        low: lower end of the 95 % interval (Student's t); −∞ for a single pair, and for differences that do not vary.
        high: upper end.
        pairs: number of pairs.
        below: pairs in which it is negative.
        p_t: p-value of the paired t test; NaN where undefined.
        p_wilcoxon: p-value of Wilcoxon's signed-rank test; with n pairs at least 2^(1−n).
        p_sign: p-value of the sign test, ties left out; likewise.
    """

    mean: Number
    low: Number
    high: Number
    pairs: int
    below: int
    p_t: Number
    p_wilcoxon: Number
    p_sign: Number

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


_DIGITS = 12
"""Beyond these digits of the largest, differences vary by rounding alone: 30 of 500 images less 20, and 20 less 10."""


def paired_difference(first: Mapping[Key, float], second: Mapping[Key, float]) -> Difference | None:
    """``first`` minus ``second``, paired by key (a seed, say); None without a pair. All tests are two-sided."""
    differences = np.array([value - second[key] for key, value in first.items() if key in second])
    n = len(differences)
    if n == 0:
        return None
    mean = float(differences.mean())
    below, above = int((differences < 0).sum()), int((differences > 0).sum())
    steps = np.round(differences / (np.abs(differences).max() or 1.0), _DIGITS)
    vary = float(np.ptp(steps)) > 0
    margin = float(stats.t.ppf(0.975, n - 1) * stats.sem(differences)) if vary else math.inf
    return Difference(
        mean=mean,
        low=mean - margin,
        high=mean + margin,
        pairs=n,
        below=below,
        p_t=float(stats.ttest_1samp(differences, 0).pvalue) if vary else math.nan,
        p_wilcoxon=float(stats.wilcoxon(steps).pvalue) if below + above else math.nan,
        p_sign=float(stats.binomtest(below, below + above).pvalue) if below + above else math.nan,
    )


def number(value: float | None, form: str) -> str:
    """A number for people; a dash where there is none, or none that is finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)
