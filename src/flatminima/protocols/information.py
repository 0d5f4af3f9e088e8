"""Normalized conditional mutual information between the orders that a measure and the test error give to minima."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from flatminima.protocols.findings import Finding, Pairs, Statistic, Weights, find
from flatminima.protocols.ledger import Ledger, Minima, combinations_of

_HELD = 2
"""Hyper-parameters that are conditioned on at most (Jiang et al.)."""

_NO_ENTROPY = 1e-15
"""In nats: below this an order is known before the measure is."""


def conditional_mutual_information(ledger: Ledger, measure: str) -> Finding:
    """The least, over sets S of up to two hyper-parameters, of I(V_m; V_e | U_S) / H(V_e | U_S) (Jiang et al. 2020).

    Over ordered pairs of minima: V_m says whether the measure of the first is greater, V_e whether its error is, and
    U_S holds the values that both have of the hyper-parameters in S. An S that leaves no entropy (every pair is alone
    with its values) takes no part. A tie is "not greater". A minimum is never paired with its own copy in a resample.

    The number lies between 0, no relation of any kind, and 1, and tells no direction. From few minima it is too large,
    and more so in resamples: its interval says how it varies, not whether it is above zero.
    """
    minima = ledger.minima(measure)
    undefined = None if ledger.hyper_parameters else "no hyper-parameters are named"
    return find(minima, lambda: _least(minima), undefined, "the hyper-parameters leave no order to be told")


def _least(minima: Minima) -> Statistic:
    """The least over all S."""
    number = len(minima.names)
    held = [list(some) for size in range(min(_HELD, number) + 1) for some in combinations(range(number), size)]
    conditioned = [_normalized(minima, combinations_of(minima.factors[:, some])) for some in held]
    whole = np.ones((1, len(minima)))
    conditioned = [found for found in conditioned if not np.isnan(found(whole)[0])]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        least = np.full(len(weights), np.nan)
        for found in conditioned:
            least = np.fmin(least, found(weights))
        return least

    return statistic


def _normalized(minima: Minima, codes: NDArray[np.intp]) -> Statistic:
    """I / H given what the codes hold, of both minima of a pair."""
    order = np.argsort(codes, kind="stable")
    x, y, codes = minima.measure[order], minima.error[order], codes[order]
    starts, units = np.flatnonzero(np.diff(codes, prepend=-1)), minima.units[order]
    groups = np.split(np.arange(len(x)), starts[1:])
    first_greater = (x[:, None] > x[None, :]).astype(float)
    first_worse = (y[:, None] > y[None, :]).astype(float)
    matrices = (1.0 - np.eye(len(x)), first_greater, first_worse, first_greater * first_worse)
    pairs = [[Pairs(units[rows], units, matrix[rows]) for matrix in matrices] for rows in groups]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        weights = weights[:, order]
        information, entropy, total = np.zeros((3, len(weights)))
        for rows, of_group in zip(groups, pairs, strict=True):
            every, greater, worse, both = (
                np.add.reduceat(some.by_column(weights[:, rows], weights), starts, axis=1) for some in of_group
            )
            with np.errstate(invalid="ignore", divide="ignore"):
                for joint, m, e in (
                    (both, greater, worse),
                    (greater - both, greater, every - worse),
                    (worse - both, every - greater, worse),
                    (every - greater - worse + both, every - greater, every - worse),
                ):
                    information += rel_entr(joint, np.where(every > 0, m * e / every, 0.0)).sum(axis=1)
            entropy -= (rel_entr(worse, every) + rel_entr(every - worse, every)).sum(axis=1)
            total += every.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(entropy > _NO_ENTROPY * total, information / entropy, np.nan)

    return statistic
