"""Statistics over trained minima: rank correlation over all of them, differences paired by seed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator
from scipy import stats

Key = TypeVar("Key", bound=Hashable)

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that JSON has as null where it is not finite; null is read as NaN."""

_RESAMPLES = 1000


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
    """Kendall's τ between an indicator and the test error, and a percentile bootstrap interval over models.

    Attributes:
        tau: over single models; 1: the indicator orders them as the test error does; NaN where undefined.
        low: 2.5 % quantile of τ over resampled models.
        high: 97.5 % quantile.
        tau_of_settings: τ over the settings' means.
    """

    tau: Number
    low: Number
    high: Number
    tau_of_settings: Number

    @property
    def defined(self) -> bool:
        """Whether τ over models is a number."""
        return not math.isnan(self.tau)


def rank_correlation(
    values: Sequence[float], errors: Sequence[float], settings: Sequence[Hashable], *, seed: int = 0
) -> RankCorrelation:
    """How well an indicator orders minima by test error (τ-b; Kendall 1945).

    The interval is :func:`scipy.stats.bootstrap`'s, over resamples whose τ is defined.

    Args:
        values: the indicator, one per model.
        errors: the test error, one per model.
        settings: which setting each model belongs to.
        seed: draws the bootstrap samples.
    """
    x, y = np.array(values, dtype=float), np.array(errors, dtype=float)
    members = [[k for k, other in enumerate(settings) if other == setting] for setting in dict.fromkeys(settings)]
    means = np.array([(x[member].mean(), y[member].mean()) for member in members])
    tau, tau_of_settings = float(kendall(x, y)), float(kendall(*means.T))
    if math.isnan(tau):
        return RankCorrelation(math.nan, math.nan, math.nan, tau_of_settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of resamples without a τ, left out below
        resampled = stats.bootstrap(
            (x, y),
            kendall,
            paired=True,
            vectorized=True,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = np.nanquantile(resampled.bootstrap_distribution, [0.025, 0.975])
    return RankCorrelation(tau, float(low), float(high), tau_of_settings)


def kendall(x: NDArray[Any], y: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    """Kendall's τ-b along an axis, many samples at once; NaN where a sample is constant or not finite.

    That of :func:`scipy.stats.kendalltau`, whose p-value a bootstrap would compute a thousand times in vain.
    """
    x, y = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
    first, second = np.triu_indices(x.shape[-1], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        up, right = np.sign(x[..., first] - x[..., second]), np.sign(y[..., first] - y[..., second])
        pairs = np.sqrt((up**2).sum(axis=-1) * (right**2).sum(axis=-1))
        tau = (up * right).sum(axis=-1) / pairs
    finite = np.isfinite(x).all(axis=-1) & np.isfinite(y).all(axis=-1)
    return np.where(finite, tau, np.nan)


@dataclass(frozen=True)
class Difference:
    """A difference paired by seed.

    Attributes:
        mean: its mean.
        low: lower end of the 95 % interval (Student's t); −∞ for a single pair.
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


def paired_difference(first: Mapping[Key, float], second: Mapping[Key, float]) -> Difference | None:
    """``first`` minus ``second``, paired by key (a seed, say); None without a pair. All tests are two-sided."""
    differences = np.array([value - second[key] for key, value in first.items() if key in second])
    n = len(differences)
    if n == 0:
        return None
    mean = float(differences.mean())
    below, above = int((differences < 0).sum()), int((differences > 0).sum())
    vary = n > 1 and float(np.ptp(differences)) > 0
    margin = float(stats.t.ppf(0.975, n - 1) * stats.sem(differences)) if n > 1 else math.inf
    return Difference(
        mean=mean,
        low=mean - margin,
        high=mean + margin,
        pairs=n,
        below=below,
        p_t=float(stats.ttest_1samp(differences, 0).pvalue) if vary else math.nan,
        p_wilcoxon=float(stats.wilcoxon(differences).pvalue) if below + above else math.nan,
        p_sign=float(stats.binomtest(below, below + above).pvalue) if below + above else math.nan,
    )


def number(value: float | None, form: str) -> str:
    """A number for people; a dash where there is none, or none that is finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)
