"""The robust sign error: how often a measure points the wrong way, in the environment where it does so most."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from flatminima.protocols.findings import Finding, Pairs, Statistic, Weights, find
from flatminima.protocols.ledger import Ledger, Minima

LEAST_SAMPLE = 12.0
"""Effective sample size that an environment needs."""

_LEAST_WEIGHT = 0.5


@dataclass(frozen=True)
class SignError(Finding):
    """The worst environment's sign error as value, and what lies around it.

    Attributes:
        mean: over all environments; None where there are none.
        environments: how many there are.
        worst: the worst one, in words.
    """

    mean: float | None = None
    environments: int = 0
    worst: str | None = None


@dataclass(frozen=True)
class _Environment:
    """Two settings that differ in one hyper-parameter alone."""

    first: NDArray[np.intp]
    """The minima of one."""
    second: NDArray[np.intp]
    """Those of the other."""
    weight: Pairs
    """Of every pair."""
    square: Pairs
    """Of every pair, squared."""
    wrong: Pairs
    """Sign error of every pair, times its weight."""
    name: str


def sign_error(ledger: Ledger, measure: str) -> SignError:
    """The robust sign error (Dziugaite et al. 2020), 0 where a measure is always right, 1/2 for a coin.

    An environment is two settings that differ in one hyper-parameter alone. Its sign error is the weighted share of
    pairs of their minima that measure and error order differently (a tie in the measure counts half). A pair whose
    errors differ by Δ on ``test_size`` samples weighs max(0, (1 − 2 exp(−n Δ²/2))₊² − 1/2): so surely, by Hoeffding's
    inequality, do they differ in truth. Environments with an effective sample size (Σw)²/Σw² below 12 are left out,
    for which settings need four seeds or more.
    """
    minima = ledger.minima(measure)
    undefined = None
    if not ledger.hyper_parameters:
        undefined = "no hyper-parameters are named"
    elif not ((minima.error >= 0) & (minima.error <= 1)).all():
        undefined = "errors outside of 0 to 1: its weights need the share of test samples that are wrong"
    environments = _environments(minima) if undefined is None else []
    if undefined is None and not environments:
        undefined = "no two settings differ in one hyper-parameter alone"
    otherwise = (
        f"of {len(environments)} pairs of settings none has an effective sample size of {LEAST_SAMPLE:g}: it takes "
        "four seeds a setting or more, and errors that surely differ"
    )
    found = find(minima, lambda: _worst(environments), undefined, otherwise)
    if found.value is None:
        return SignError(**vars(found))
    errors = _errors(environments, np.ones((1, len(minima))))[0]
    return SignError(
        **vars(found),
        mean=float(np.nanmean(errors)),
        environments=int(np.isfinite(errors).sum()),
        worst=environments[int(np.nanargmax(errors))].name,
    )


def hoeffding_weight(difference: NDArray[np.float64], test_size: int) -> NDArray[np.float64]:
    """How surely errors that differ so much on ``test_size`` samples differ in truth: (1 − 2 exp(−n Δ²/2))₊²."""
    return np.square(np.maximum(0.0, 1.0 - 2.0 * np.exp(-2.0 * test_size * np.square(difference / 2.0))))


def _environments(minima: Minima) -> list[_Environment]:
    settings, of_setting = np.unique(minima.settings, return_index=True)
    factors = minima.factors[of_setting]
    members = [np.flatnonzero(minima.settings == setting) for setting in settings]
    found = []
    for one, other in combinations(range(len(settings)), 2):
        differing = np.flatnonzero(factors[one] != factors[other])
        if len(differing) == 1:
            first, second = members[one], members[other]
            gap = minima.error[first][:, None] - minima.error[second][None, :]
            change = minima.measure[first][:, None] - minima.measure[second][None, :]
            weight = np.maximum(hoeffding_weight(np.abs(gap), minima.test_size) - _LEAST_WEIGHT, 0.0)
            wrong = weight * (1.0 - np.sign(change) * np.sign(gap)) / 2.0
            units = minima.units[first], minima.units[second]
            found.append(
                _Environment(
                    first=first,
                    second=second,
                    weight=Pairs(*units, weight),
                    square=Pairs(*units, weight**2),
                    wrong=Pairs(*units, wrong),
                    name=_name(minima, factors[one], factors[other], int(differing[0])),
                )
            )
    return found


def _name(minima: Minima, one: NDArray[np.intp], other: NDArray[np.intp], axis: int) -> str:
    """Such as ``lr 0.1 or 0.01 (momentum 0.9)``."""
    held = [f"{name} {minima.levels[k][one[k]]}" for k, name in enumerate(minima.names) if k != axis]
    levels = minima.levels[axis]
    return f"{minima.names[axis]} {levels[one[axis]]} or {levels[other[axis]]}" + (f" ({', '.join(held)})" * bool(held))


def _worst(environments: list[_Environment]) -> Statistic:
    def statistic(weights: Weights) -> NDArray[np.float64]:
        errors = _errors(environments, weights)
        return np.where(np.isnan(errors).all(axis=1), np.nan, np.fmax.reduce(errors, axis=1))

    return statistic


def _errors(environments: list[_Environment], weights: Weights) -> NDArray[np.float64]:
    """Every environment's sign error in every resample, (R, E); NaN where its effective sample is too small."""
    errors = np.empty((len(weights), len(environments)))
    for k, environment in enumerate(environments):
        first, second = weights[:, environment.first], weights[:, environment.second]
        total, squares, wrong = (
            pairs.total(first, second) for pairs in (environment.weight, environment.square, environment.wrong)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            sample = np.where(squares > 0, total**2 / squares, 0.0)
            enough = (sample > LEAST_SAMPLE) | np.isclose(sample, LEAST_SAMPLE)
            errors[:, k] = np.where(enough, wrong / total, np.nan)
    return errors
