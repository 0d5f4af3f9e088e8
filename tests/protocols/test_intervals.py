"""Bootstrap intervals, against ledgers that are drawn and written out row by row."""

from __future__ import annotations

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

FEW = 20

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


def of_seeds(frame: pd.DataFrame, chosen: np.ndarray) -> pd.DataFrame:
    """The minima of the seeds drawn; a seed drawn twice is two seeds."""
    parts = [frame[frame["seed"] == seed].assign(seed=k) for k, seed in enumerate(chosen)]
    return pd.concat(parts, ignore_index=True)


def test_minima_are_redrawn_where_no_seeds_are_named(few_resamples: None) -> None:
    frame = random_frame(12)
    taus = [stats.kendalltau(frame["x"][rows], frame["error"][rows]).statistic for rows in drawn(len(frame))]
    assert kendall(ledger_of(frame), "x").interval == quantiles(taus)


def test_seeds_are_redrawn_as_wholes(few_resamples: None) -> None:
    frame = random_frame(13, seeds=4)
    frames = [of_seeds(frame, chosen) for chosen in drawn(4)]
    ledger = ledger_of(frame, seed="seed")
    assert kendall(ledger, "x").interval == quantiles([stats.kendalltau(f["x"], f["error"]).statistic for f in frames])
    partial = [partial_kendall(ledger_of(f), "x").value for f in frames]
    assert partial_kendall(ledger, "x").interval == quantiles([value for value in partial if value is not None])
    axes = [mbe_eval.granulated_kendall(f, "x", "error", ["lr", "optimizer", "seed"])[1] for f in frames]
    psi = [axis["granulated_kendall"][:2].mean() for axis in axes]
    assert granulated_kendall(ledger, "x").interval == quantiles(psi)


def test_the_worst_environment_is_found_anew_in_every_resample(few_resamples: None) -> None:
    frame = random_frame(14, seeds=5)
    worst = []
    for chosen in drawn(5):
        environments = mbe_eval.robust_sign_error_environments(
            of_seeds(frame, chosen), ["x"], ["lr", "optimizer"], target="error", config_column="setting", test_size=1000
        )
        worst.append(environments["x"].max() if len(environments) else np.nan)
    assert sign_error(ledger_of(frame, seed="seed"), "x").interval == quantiles(worst)


def test_information_pairs_no_minimum_with_its_own_copy(few_resamples: None) -> None:
    frame = random_frame(15)
    found = []
    for chosen in drawn(len(frame)):
        times = np.bincount(chosen, minlength=len(frame)).tolist()
        held = ([], ["lr"], ["optimizer"], ["lr", "optimizer"])
        found.append(np.nanmin([normalized_information(frame, columns, times) for columns in held]))
    assert conditional_mutual_information(ledger_of(frame), "x").interval == quantiles(found)


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
    assert found.reason == "no interval: 2 seeds are too few to resample, it takes 3"


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
