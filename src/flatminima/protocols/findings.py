"""What a protocol says of a measure: a value with its bootstrap interval, or the reason why there is none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from flatminima.protocols.ledger import Minima

Weights = NDArray[np.float64]
"""(R, n): how often every minimum occurs in each of R resamples; all ones are the ledger itself."""

Matrix = NDArray[np.float64]

Statistic = Callable[[Weights], NDArray[np.float64]]
"""A protocol's value in every resample, (R,); NaN where it is not defined."""

RESAMPLES = 1000
LEAST = 3
"""Minima that an order needs; units that an interval needs."""

_SEED = 0


@dataclass(frozen=True)
class Finding:
    """One protocol's number for one measure.

    Attributes:
        value: the number; None where it is not defined.
        interval: its 95 % bootstrap interval; None where there is none.
        n: minima that it rests on.
        reason: why value or interval is None.
    """

    value: float | None
    interval: tuple[float, float] | None
    n: int
    reason: str | None = None

    @property
    def above_zero(self) -> bool:
        """Whether the interval lies above zero."""
        return self.interval is not None and self.interval[0] > 0

    @property
    def below_zero(self) -> bool:
        """Whether the interval lies below zero."""
        return self.interval is not None and self.interval[1] < 0


def find(minima: Minima, statistic: Callable[[], Statistic], undefined: str | None, otherwise: str) -> Finding:
    """A statistic with its interval.

    Args:
        minima: what it is of.
        statistic: makes it; called only where it can be defined.
        undefined: why it cannot.
        otherwise: why it is not, if it turns out to be NaN.
    """
    reason = undefined or reason_of(minima)
    if reason is not None:
        return Finding(None, None, len(minima), reason)
    made = statistic()
    value = float(made(np.ones((1, len(minima))))[0])
    if math.isnan(value):
        return Finding(None, None, len(minima), otherwise)
    found = bootstrap(minima, made)
    return Finding(value, None, len(minima), found) if isinstance(found, str) else Finding(value, found, len(minima))


def reason_of(minima: Minima) -> str | None:
    """Why no order of these minima can be judged, if so."""
    if len(minima) < LEAST:
        return f"{len(minima)} minima are too few, it takes {LEAST}"
    if np.ptp(minima.measure) == 0:
        return "the measure is the same at all minima"
    if np.ptp(minima.error) == 0:
        return "the error is the same at all minima"
    return None


class Pairs:
    """Sums over pairs of minima in every resample.

    Two minima of a unit that is drawn twice are a pair twice, not four times: one copy of the unit does not meet the
    other. Otherwise what a seed's minima share would weigh more in resamples than in the ledger.

    Args:
        rows: units of the minima that stand first in a pair.
        columns: units of those that stand second.
        matrix: what is summed, (rows, columns).
    """

    def __init__(self, rows: NDArray[np.intp], columns: NDArray[np.intp], matrix: Matrix) -> None:
        self._matrix = matrix
        within = np.where(rows[:, None] == columns[None, :], matrix, 0.0)
        self._within = within if within.any() else None

    def by_column(self, first: Weights, second: Weights) -> NDArray[np.float64]:
        """Sums over what stands first, for everything that stands second, (R, columns)."""
        found: NDArray[np.float64] = (first @ self._matrix) * second
        if self._within is not None:
            found -= (first**2 - first) @ self._within
        return found

    def total(self, first: Weights, second: Weights) -> NDArray[np.float64]:
        """Sums over all pairs, (R,)."""
        total: NDArray[np.float64] = self.by_column(first, second).sum(axis=1)
        return total


def strata_of(minima: Minima) -> list[NDArray[np.intp]]:
    """Within what units are drawn: all together; or the settings, where every seed is of one and each has several."""
    units = np.unique(minima.units)
    pairs = np.unique(np.stack([minima.units, minima.settings]), axis=1)
    if minima.nests_seeds:
        strata = [pairs[0][pairs[1] == setting] for setting in np.unique(pairs[1])]
        if all(len(stratum) > 1 for stratum in strata):
            return strata
    return [units]


def bootstrap(minima: Minima, statistic: Statistic) -> tuple[float, float] | str:
    """The 95 % percentile interval over :data:`RESAMPLES` resamples, always the same ones; or why there is none."""
    units, strata = minima.units, strata_of(minima)
    kind, number = "minima" if minima.seeds is None else "seeds", sum(map(len, strata))
    if number < LEAST:
        return f"no interval: resampling takes at least {LEAST} {kind}, not {number}"
    many = int(units.max()) + 1

    def of_drawn(*drawn: NDArray[np.intp], axis: int = -1) -> NDArray[np.float64]:
        chosen = np.concatenate(drawn, axis=axis)
        offset = many * np.arange(len(chosen))[:, None]
        counts = np.bincount((chosen + offset).ravel(), minlength=many * len(chosen)).reshape(len(chosen), many)
        return statistic(counts[:, units].astype(float))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of undefined resamples, left out below
        resampled: NDArray[Any] = stats.bootstrap(
            strata,
            of_drawn,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(_SEED),
        ).bootstrap_distribution
    defined = resampled[~np.isnan(resampled)]
    if 2 * len(defined) < RESAMPLES:
        return f"no interval: undefined in {RESAMPLES - len(defined)} of {RESAMPLES} resamples of {kind}"
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)
