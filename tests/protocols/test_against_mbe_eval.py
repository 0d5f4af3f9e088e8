"""Random ledgers with ties: the same numbers as mbe-eval, wherever it computes the papers'."""

from __future__ import annotations

import math
import warnings

import mbe_eval
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatminima.protocols import (
    Finding,
    conditional_mutual_information,
    granulated_kendall,
    kendall,
    kendall_of_settings,
    sign_error,
)
from support.ledgers import ledger_of, random_frame

HYPER_PARAMETERS = ["lr", "optimizer"]

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.LedgerWarning")  # copies of rows, by chance
random_ledgers = st.integers(0, 10**6).map(random_frame)
many = settings(max_examples=15, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def values_alone() -> None:
    """Intervals have tests of their own; here they would take most of the time."""
    patch = pytest.MonkeyPatch()
    patch.setattr("flatminima.protocols.findings.RESAMPLES", 2)
    yield
    patch.undo()


def agree(found: Finding, expected: float) -> bool:
    if found.value is None:
        return math.isnan(expected) and bool(found.reason)
    return found.value == pytest.approx(expected, rel=1e-12, abs=1e-12)


@many
@given(random_ledgers)
def test_kendalls_tau_of_minima_and_of_settings(frame: pd.DataFrame) -> None:
    ledger = ledger_of(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of constants
        assert agree(kendall(ledger, "x"), mbe_eval.kendall_rank_correlation(frame["x"], frame["error"]))
        means = frame.groupby(HYPER_PARAMETERS)[["x", "error"]].mean().round(9)
        found = kendall_of_settings(ledger, "x")
        if frame[["x", "error"]].nunique().min() > 1:
            assert agree(found, mbe_eval.kendall_rank_correlation(means["x"], means["error"]))


@many
@given(random_ledgers)
def test_granulated_tau(frame: pd.DataFrame) -> None:
    expected, _ = mbe_eval.granulated_kendall(frame, "x", "error", HYPER_PARAMETERS)
    assert agree(granulated_kendall(ledger_of(frame), "x"), expected)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_granulated_tau_holds_the_seed_where_the_ledger_names_it(number: int) -> None:
    frame = random_frame(number, seeds=3)
    _, axes = mbe_eval.granulated_kendall(frame, "x", "error", [*HYPER_PARAMETERS, "seed"])
    expected = axes["granulated_kendall"][:2].mean()
    assert agree(granulated_kendall(ledger_of(frame, seed="seed"), "x"), expected)


@many
@given(random_ledgers)
def test_conditional_mutual_information(frame: pd.DataFrame) -> None:
    expected, _ = mbe_eval.jiang_normalized_cmi(frame, "x", "error", HYPER_PARAMETERS)
    found = conditional_mutual_information(ledger_of(frame), "x")
    if frame["x"].nunique() == 1:
        assert found.reason == "the measure is the same at all minima"  # where mbe-eval has 0
    else:
        assert agree(found, expected)


@many
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_sign_errors_of_environments(number: int, seeds: int) -> None:
    frame = random_frame(number, seeds=seeds)
    environments = mbe_eval.robust_sign_error_environments(
        frame, ["x"], HYPER_PARAMETERS, target="error", config_column="setting", test_size=1000
    )
    found = sign_error(ledger_of(frame), "x")
    assert 2 * found.environments == len(environments)  # both directions of a pair are the same
    if len(environments):
        assert found.value == pytest.approx(environments["x"].max(), rel=1e-12, abs=1e-12)
        assert found.mean == pytest.approx(environments["x"].mean(), rel=1e-12, abs=1e-12)
    else:
        assert found.value is None


def test_hyper_parameters_that_differ_by_little_differ() -> None:
    """mbe-eval takes 1e-9 and 2e-9 for the same, as numpy.isclose does."""
    frame = random_frame(0, seeds=5).assign(lr=lambda frame: frame["lr"].map({0.1: 1e-9, 0.2: 2e-9, 0.4: 4e-9}))
    theirs = mbe_eval.robust_sign_error_environments(
        frame, ["x"], HYPER_PARAMETERS, target="error", config_column="setting", test_size=1000
    )
    assert "lr" not in set(theirs["hyperparameter"])
    assert 2 * sign_error(ledger_of(frame), "x").environments > len(theirs)
