"""Kendall's rank correlation between a measure and the test error: plain, granulated, and given another column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatminima.protocols.findings import Finding, Pairs, Statistic, Weights, find
from flatminima.protocols.ledger import Ledger, Minima, combinations_of

_TIE = 1e-12
"""Means of settings are tied that differ by less, in units of both means of the absolute values: of k values, rounding
moves a mean by at most (k + 2) · 1.1e-16 of that, in whatever order they are summed; more only from k = 9,000 on."""

_NONE_LEFT = 1e-12
"""What rounding leaves of √((1 − τ²)(1 − τ²)) where one τ is ±1."""

_PAIRS_AT_ONCE = 10_000_000

_ALL_TIED = "no two minima differ in both"


def kendall(ledger: Ledger, measure: str) -> Finding:
    """Kendall's τ-b over single minima: 1 where the measure orders them exactly as their errors do (Kendall 1945)."""
    minima = ledger.minima(measure)
    return find(minima, lambda: correlation(minima.measure, minima.error, minima.units), None, _ALL_TIED)


def kendall_of_settings(ledger: Ledger, measure: str) -> Finding:
    """Kendall's τ-b over the means of settings: what is left of the order once seeds are averaged out."""
    minima = ledger.minima(measure)
    undefined = None if ledger.hyper_parameters else "no hyper-parameters are named"
    number = len(np.unique(minima.settings))
    if undefined is None and number == len(minima):
        return kendall(ledger, measure)
    if undefined is None and number == 1:
        undefined = "all minima are of one setting"
    return find(minima, lambda: _of_settings(minima), undefined, "the means of all settings are tied")


def partial_kendall(ledger: Ledger, measure: str) -> Finding:
    """Kendall's partial τ of measure and error given the ledger's column ``given`` (Kendall 1942), from τ-b.

    (τ_me − τ_mg τ_ge) / √((1 − τ_mg²)(1 − τ_ge²)): what the measure says about the order of errors beyond what the
    training loss, say, has said. A noisy copy of what is given has a partial τ above zero all the same (Korn 1984), by
    up to 0.3: see :func:`partial_correlation`.
    """
    return _beyond_given(ledger, measure, _partial)


def partial_correlation(ledger: Ledger, measure: str) -> Finding:
    """The partial correlation of measure and error given ``given`` in a Gaussian copula (Liu et al. 2012), from τ-b.

    Every τ becomes the correlation sin(πτ/2) that two normal variables with this τ have, whatever the scale of the
    columns, and those make the partial correlation. It is zero for a measure that is what is given plus noise, where
    :func:`partial_kendall` is not.
    """
    return _beyond_given(ledger, measure, lambda tau: _partial(np.sin(np.pi / 2 * tau)))


def _beyond_given(
    ledger: Ledger, measure: str, partial: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> Finding:
    """A partial coefficient, from those of (measure, error), (measure, given) and (given, error)."""
    minima = ledger.minima(measure, given=True)
    undefined = None
    if ledger.given is None:
        undefined = "no column is named that the measure must add to"
    elif measure == ledger.given:
        undefined = f"{measure} is what is given"
    elif len(minima) and minima.given is not None and np.ptp(minima.given) == 0:
        undefined = f"{ledger.given} is the same at all minima"

    def statistic() -> Statistic:
        assert minima.given is not None
        taus = (
            correlation(minima.measure, minima.error, minima.units),
            correlation(minima.measure, minima.given, minima.units),
            correlation(minima.given, minima.error, minima.units),
        )
        return lambda weights: partial(np.stack([tau(weights) for tau in taus]))

    otherwise = f"{ledger.given} orders the minima as the measure or the error does"
    return find(minima, statistic, undefined, otherwise)


def granulated_kendall(ledger: Ledger, measure: str) -> Finding:
    """Granulated τ, Ψ (Jiang et al. 2020): the mean over hyper-parameters of τ-b where only that one varies.

    For every hyper-parameter, minima that agree in all others are a cell (and in the seed, where the ledger names its
    seeds); ψ is the mean of the cells' τ, and Ψ that of the ψ. Cells in which τ is undefined take no part.
    """
    minima = ledger.minima(measure)
    undefined, within = None if ledger.hyper_parameters else "no hyper-parameters are named", ""
    if minima.seeds is not None:
        within = " of one seed"
        if undefined is None and len(np.unique(minima.settings)) > 1 and minima.nests_seeds:
            undefined = f"every {ledger.seed} is of one setting alone, so that it pairs no minima: name no seeds"
    otherwise = f"no two minima{within} differ in a single hyper-parameter and in both"
    return find(minima, lambda: _granulated(minima), undefined, otherwise)


def tau_b(x: NDArray[Any], y: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    """Kendall's τ-b along an axis, many samples at once; NaN where a sample is constant or not finite.

    That of :func:`scipy.stats.kendalltau`, whose p-value a bootstrap would compute a thousand times in vain.

    Args:
        x: samples along ``axis``.
        y: likewise, of the same shape.
        axis: which.
    """
    x, y = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
    first, second = np.triu_indices(x.shape[-1], 1)
    with np.errstate(invalid="ignore"):
        up, right = np.sign(x[..., first] - x[..., second]), np.sign(y[..., first] - y[..., second])
    finite = np.isfinite(x).all(axis=-1) & np.isfinite(y).all(axis=-1)
    return np.where(finite, _tau_of_signs(up, right), np.nan)


def _tau_of_signs(up: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """τ-b of pairs' signs in two columns, along the last axis; NaN where one is."""
    return _ratio((up * right).sum(axis=-1), (up**2).sum(axis=-1), (right**2).sum(axis=-1))


def correlation(x: NDArray[np.float64], y: NDArray[np.float64], units: NDArray[np.intp]) -> Statistic:
    """τ-b of n pairs (x, y), each as often as its unit is drawn."""
    up, right = signs(x), signs(y)
    agreeing, untied_x, untied_y = (Pairs(units, units, matrix) for matrix in (up * right, up**2, right**2))

    def statistic(weights: Weights) -> NDArray[np.float64]:
        return _ratio(*(pairs.total(weights, weights) for pairs in (agreeing, untied_x, untied_y)))

    return statistic


def signs(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """sign(x_i − x_j), (n, n)."""
    order: NDArray[np.float64] = np.sign(x[:, None] - x[None, :])
    return order


def _ratio(agreeing: NDArray[Any], untied_x: NDArray[Any], untied_y: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(invalid="ignore", divide="ignore"):
        tau: NDArray[Any] = agreeing / np.sqrt(untied_x * untied_y)
    return tau


def _of_settings(minima: Minima) -> Statistic:
    member = (minima.settings[:, None] == np.unique(minima.settings)).astype(float)
    at_once = 1 + _PAIRS_AT_ONCE // member.shape[1] ** 2
    first, second = np.triu_indices(member.shape[1], 1)

    def means(weights: Weights, values: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # a setting that was not drawn
            found: NDArray[np.float64] = ((weights * values) @ member) / (weights @ member)
        return found

    def signs_of_pairs(weights: Weights, values: NDArray[np.float64]) -> NDArray[np.float64]:
        values = values / (np.abs(values).max() or 1.0)  # lest sums overflow
        mean, size = means(weights, values), means(weights, np.abs(values))
        difference = mean[:, first] - mean[:, second]
        tied = np.abs(difference) <= _TIE * (size[:, first] + size[:, second])
        return np.where(tied, 0.0, np.sign(difference))

    def statistic(weights: Weights) -> NDArray[np.float64]:
        parts = np.split(weights, range(at_once, len(weights), at_once))
        signs = ([signs_of_pairs(part, column) for column in (minima.measure, minima.error)] for part in parts)
        return np.concatenate([_tau_of_signs(*of_part) for of_part in signs])

    return statistic


def _partial(coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first coefficient given the other two, (3, R) → (R,)."""
    direct, one, other = coefficients
    left = np.sqrt((1 - one**2) * (1 - other**2))
    left[left < _NONE_LEFT] = np.nan
    partial: NDArray[np.float64] = np.clip((direct - one * other) / left, -1.0, 1.0)
    return partial


def _granulated(minima: Minima) -> Statistic:
    axes = [_along(minima, axis) for axis in range(len(minima.names))]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        return mean_of_defined(np.stack([along(weights) for along in axes], axis=1), np.ones((1, len(axes))))

    return statistic


def _along(minima: Minima, axis: int) -> Statistic:
    """ψ of one hyper-parameter."""
    held = np.delete(minima.factors, axis, axis=1)
    if minima.seeds is not None:
        held = np.column_stack([held, minima.seeds])
    codes = combinations_of(held)
    cells = [np.flatnonzero(codes == code) for code in np.unique(codes)]
    cells = [cell for cell in cells if np.ptp(minima.factors[cell, axis]) > 0]
    statistics = [correlation(minima.measure[cell], minima.error[cell], minima.units[cell]) for cell in cells]
    members = [
        (minima.factors[cell, axis][:, None] == np.unique(minima.factors[cell, axis])).astype(float) for cell in cells
    ]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        if not cells:
            return np.full(len(weights), np.nan)
        taus, times = np.empty((2, len(weights), len(cells)))
        for k, (cell, of_cell, member) in enumerate(zip(cells, statistics, members, strict=True)):
            drawn = weights[:, cell]
            varies = ((drawn @ member) > 0).sum(axis=1) > 1
            taus[:, k] = np.where(varies, of_cell(drawn), np.nan)
            # a seed drawn twice is two seeds, and so are its cells; a minimum drawn twice is in the one cell
            times[:, k] = 1.0 if minima.seeds is None else drawn.max(axis=1)
        return mean_of_defined(taus, times)

    return statistic


def mean_of_defined(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean of every row without its NaN; NaN where a row has nothing else."""
    defined = ~np.isnan(values)
    weights = np.where(defined, weights, 0.0)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = (np.where(defined, values, 0.0) * weights).sum(axis=1) / weights.sum(axis=1)
    return mean
