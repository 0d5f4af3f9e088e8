"""Bootstrap intervals, against ledgers that are drawn and written out row by row."""

from __future__ import annotations

import itertools
import math

import mbe_eval
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatminima.protocols import (
    RESAMPLES,
    Ledger,
    conditional_mutual_information,
    granulated_kendall,
    kendall,
    partial_kendall,
    sign_error,
)
from support.ledgers import ledger_of, normalized_information, random_frame

FEW = 12

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.LedgerWarning")


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatminima.protocols.findings.RESAMPLES", FEW)


def drawn(units: int) -> np.ndarray:
    """The resamples that every interval is of."""
    return np.random.default_rng(0).integers(0, units, (FEW, units))


def quantiles(values: list[float]) -> tuple[float, float]:
    low, high = np.nanquantile(values, [0.025, 0.975])
    return pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12)


def times_of_pairs(units: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How often every two minima are a pair: copies of one unit do not meet each other."""
    times = np.array([(chosen == unit).sum() for unit in units])
    return np.where(units[:, None] == units, times[:, None], times[:, None] * times)


def tau_of(x: pd.Series, y: pd.Series, times: np.ndarray) -> float:
    up, right = (np.sign(values.to_numpy()[:, None] - values.to_numpy()) for values in (x, y))
    return float((times * up * right).sum() / math.sqrt((times * up**2).sum() * (times * right**2).sum()))


def test_minima_are_redrawn_where_no_seeds_are_named(few_resamples: None) -> None:
    frame = random_frame(12)
    taus = [stats.kendalltau(frame["x"][rows], frame["error"][rows]).statistic for rows in drawn(len(frame))]
    assert kendall(ledger_of(frame), "x").interval == quantiles(taus)


def test_seeds_are_redrawn_as_wholes(few_resamples: None) -> None:
    frame = random_frame(13, seeds=4)
    ledger = ledger_of(frame, seed="seed")
    direct, partial = [], []
    for chosen in drawn(4):
        times = times_of_pairs(frame["seed"].to_numpy(), chosen)
        taus = [tau_of(frame[a], frame[b], times) for a, b in (("x", "error"), ("x", "loss"), ("loss", "error"))]
        direct.append(taus[0])
        partial.append((taus[0] - taus[1] * taus[2]) / math.sqrt((1 - taus[1] ** 2) * (1 - taus[2] ** 2)))
    assert kendall(ledger, "x").interval == quantiles(direct)
    assert partial_kendall(ledger, "x").interval == quantiles(partial)


def test_a_seed_that_is_drawn_twice_has_cells_of_its_own_twice(few_resamples: None) -> None:
    frame, psi = random_frame(13, seeds=4), []
    for chosen in drawn(4):
        parts = [frame[frame["seed"] == seed].assign(seed=k) for k, seed in enumerate(chosen)]
        names = ["lr", "optimizer", "seed"]
        _, axes = mbe_eval.granulated_kendall(pd.concat(parts, ignore_index=True), "x", "error", names)
        psi.append(axes["granulated_kendall"][:2].mean())
    assert granulated_kendall(ledger_of(frame, seed="seed"), "x").interval == quantiles(psi)


def test_the_worst_environment_is_found_anew_in_every_resample(few_resamples: None) -> None:
    frame, worst = random_frame(14, seeds=5), []
    x, error, setting = (frame[name].to_numpy() for name in ("x", "error", "setting"))
    wrong = (1 - np.sign(x[:, None] - x) * np.sign(error[:, None] - error)) / 2
    surely = np.maximum(0, 1 - 2 * np.exp(-500 * (error[:, None] - error) ** 2)) ** 2
    weight = np.maximum(surely - 0.5, 0)
    neighbours = [
        (one, other)
        for one, other in itertools.combinations(sorted(set(setting)), 2)
        if sum(a != b for a, b in zip(one.split(), other.split(), strict=True)) == 1
    ]
    for chosen in drawn(5):
        times = times_of_pairs(frame["seed"].to_numpy(), chosen)
        errors = []
        for one, other in neighbours:
            of_pair = np.outer(setting == one, setting == other)
            total, squares = ((of_pair * times * weight**power).sum() for power in (1, 2))
            if total**2 / squares >= 12:
                errors.append((of_pair * times * weight * wrong).sum() / total)
        worst.append(max(errors, default=math.nan))
    assert len(neighbours) == 9
    assert sign_error(ledger_of(frame, seed="seed"), "x").interval == quantiles(worst)


@pytest.mark.parametrize("seeds", [None, 3])
def test_information_pairs_no_minimum_with_its_own_copy(seeds: int | None, few_resamples: None) -> None:
    frame, found = random_frame(15, seeds=seeds), []
    units = np.arange(len(frame)) if seeds is None else frame["seed"].to_numpy()
    for chosen in drawn(seeds or len(frame)):
        times = times_of_pairs(units, chosen)
        held = ([], ["lr"], ["optimizer"], ["lr", "optimizer"])
        found.append(np.nanmin([normalized_information(frame, columns, times) for columns in held]))
    ledger = ledger_of(frame, seed="seed" if seeds else None)
    assert conditional_mutual_information(ledger, "x").interval == quantiles(found)


def test_seeds_of_one_setting_each_are_redrawn_within_it(few_resamples: None) -> None:
    """Every setting keeps its number of minima: here both have the same measure throughout, so τ does not vary."""
    frame = pd.DataFrame({"lr": [1] * 3 + [2] * 3, "seed": range(6), "x": [1.0] * 3 + [2.0] * 3})
    ledger = Ledger.of(frame.assign(error=frame["x"] / 10), error="error", hyper_parameters=["lr"], seed="seed")
    found = kendall(ledger, "x")
    assert (found.value, found.interval) == (1.0, (1.0, 1.0))
    seeds_in_common = Ledger.of(
        frame.assign(error=frame["x"] / 10, seed=[0, 1, 2] * 2), error="error", hyper_parameters=["lr"], seed="seed"
    )
    assert kendall(seeds_in_common, "x").interval == (1.0, 1.0)


def test_two_seeds_have_no_interval_and_say_so() -> None:
    found = kendall(ledger_of(random_frame(16, seeds=2), seed="seed"), "x")
    assert found.value is not None
    assert found.interval is None
    assert found.reason == "no interval: resampling takes at least 3 seeds, not 2"


def test_an_interval_is_not_made_of_the_few_resamples_that_have_a_value() -> None:
    """Three minima of which two are tied: most resamples are constant in one of both."""
    frame = pd.DataFrame({"x": [0.0, 0.0, 1.0], "error": [0.1, 0.2, 0.2]})
    found = kendall(Ledger.of(frame, error="error"), "x")
    assert found.value == 0.5
    assert found.interval is None
    assert (found.reason or "").startswith("no interval: undefined in ")


def test_intervals_are_the_same_every_time_and_of_a_thousand_resamples() -> None:
    ledger = ledger_of(random_frame(17, seeds=5), seed="seed")
    assert kendall(ledger, "x") == kendall(ledger, "x")
    assert RESAMPLES == 1000
