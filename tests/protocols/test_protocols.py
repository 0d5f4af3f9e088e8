"""Every protocol against its definition, spelt out; and what it says where it is not defined."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatminima.protocols import (
    Finding,
    Ledger,
    conditional_mutual_information,
    granulated_kendall,
    kendall,
    kendall_of_settings,
    partial_correlation,
    partial_kendall,
    sign_error,
    tau_b,
)
from support.ledgers import ledger_of, normalized_information, random_frame

Protocol = Callable[[Ledger, str], Finding]
PROTOCOLS = [
    kendall,
    kendall_of_settings,
    partial_kendall,
    partial_correlation,
    granulated_kendall,
    conditional_mutual_information,
    sign_error,
]

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.LedgerWarning")


def test_tau_b_is_scipys_along_any_axis() -> None:
    x, y = np.random.default_rng(0).integers(0, 5, size=(2, 20, 9)).astype(float)
    x[3], y[4, 2], y[5, 1] = 1.0, math.nan, math.inf
    expected = [
        stats.kendalltau(a, b).statistic if np.isfinite(b).all() else math.nan for a, b in zip(x, y, strict=True)
    ]
    assert np.isnan(expected).sum() == 3
    assert tau_b(x, y) == pytest.approx(expected, nan_ok=True)
    assert tau_b(x.T, y.T, axis=0) == pytest.approx(expected, nan_ok=True)


def test_partial_tau_without_ties_is_the_phi_coefficient_of_concordances() -> None:
    """Kendall's own definition: over pairs of minima, whether each of two orders agrees with that of the given."""
    generator = np.random.default_rng(3)
    x, loss, error = (generator.permutation(12).astype(float) for _ in range(3))
    frame = random_frame(0, seeds=2).assign(x=x, loss=loss, error=error / 20)
    counts = Counter(
        (
            (x[i] > x[j]) == (loss[i] > loss[j]),
            (error[i] > error[j]) == (loss[i] > loss[j]),
        )
        for i, j in itertools.combinations(range(12), 2)
    )
    a, b, c, d = (counts[pair] for pair in ((True, True), (True, False), (False, True), (False, False)))
    phi = (a * d - b * c) / math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    assert partial_kendall(ledger_of(frame), "x").value == pytest.approx(phi, rel=1e-12)


def test_partial_tau_with_ties_is_that_of_three_taus() -> None:
    frame = random_frame(7)
    direct, of_x, of_error = (
        stats.kendalltau(frame[one], frame[other]).statistic
        for one, other in (("x", "error"), ("x", "loss"), ("loss", "error"))
    )
    expected = (direct - of_x * of_error) / math.sqrt((1 - of_x**2) * (1 - of_error**2))
    assert partial_kendall(ledger_of(frame), "x").value == pytest.approx(expected, rel=1e-12)


def test_the_partial_correlation_is_that_of_normal_variables_with_these_taus() -> None:
    frame = random_frame(8)
    names = ["x", "error", "loss"]
    of_taus = [[math.sin(math.pi / 2 * stats.kendalltau(frame[a], frame[b]).statistic) for b in names] for a in names]
    precision = np.linalg.inv(np.array(of_taus))
    expected = -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])
    assert partial_correlation(ledger_of(frame), "x").value == pytest.approx(expected, rel=1e-12)


def test_a_noisy_copy_of_the_given_has_a_partial_tau_but_no_partial_correlation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Normal variables: of measure and error, each 0.98 with the loss and independent beside it."""
    monkeypatch.setattr("flatminima.protocols.findings.RESAMPLES", 2)
    generator = np.random.default_rng(0)
    loss, x, error = generator.normal(size=(3, 800))
    frame = pd.DataFrame({"loss": loss, "x": 0.98 * loss + 0.2 * x, "error": 0.98 * loss + 0.2 * error})
    ledger = Ledger.of(frame, error="error", given="loss", measures=["x"])
    own, shared = (2 / math.pi * math.asin(rho) for rho in (0.98, 0.98**2))
    assert partial_kendall(ledger, "x").value == pytest.approx((shared - own**2) / (1 - own**2), abs=0.05)
    assert partial_kendall(ledger, "x").value > 0.2
    assert partial_correlation(ledger, "x").value == pytest.approx(0, abs=0.08)


def test_a_measure_that_repeats_the_given_adds_nothing() -> None:
    frame = random_frame(1, seeds=4)
    for copy in (np.exp(frame["loss"]), -frame["loss"]):
        found = partial_kendall(ledger_of(frame.assign(x=copy)), "x")
        assert found.value is None
        assert found.reason == "loss orders the minima as the measure or the error does"


def test_granulated_tau_sees_what_only_one_hyper_parameter_explains() -> None:
    """The measure follows the optimizer alone, and wrongly follows lr: half of Ψ each."""
    frame = pd.DataFrame([(lr, kind, 10 * kind - lr, 10 * kind + lr) for lr in range(4) for kind in range(3)])
    frame.columns = pd.Index(["lr", "optimizer", "x", "error"])
    ledger = ledger_of(frame, given=None)
    assert granulated_kendall(ledger, "x").value == pytest.approx((-1 + 1) / 2)


def test_conditional_mutual_information_is_its_definition() -> None:
    frame = random_frame(11)
    held = ([], ["lr"], ["optimizer"], ["lr", "optimizer"])
    expected = min(value for columns in held if not math.isnan(value := normalized_information(frame, columns)))
    assert conditional_mutual_information(ledger_of(frame), "x").value == pytest.approx(expected, rel=1e-12)


def test_the_sign_error_of_two_settings_by_hand() -> None:
    """Four seeds each. One of four in the better setting has a measure that is too large: a quarter of all pairs."""
    frame = pd.DataFrame({"lr": [1] * 4 + [2] * 4, "error": [0.1] * 4 + [0.5] * 4})
    frame["x"] = [1.0, 2, 3, 9, 5, 6, 7, 8]
    found = sign_error(Ledger.of(frame, error="error", hyper_parameters=["lr"], measures=["x"]), "x")
    assert (found.value, found.mean, found.environments) == (0.25, 0.25, 1)
    assert found.worst == "lr 1 or 2"
    tied = frame.assign(x=[1.0, 2, 3, 5, 5, 5, 5, 5])
    assert sign_error(Ledger.of(tied, error="error", hyper_parameters=["lr"], measures=["x"]), "x").value == 0.125


def test_pairs_weigh_by_how_surely_they_differ() -> None:
    """On 100 test samples an error that is larger by 0.25 weighs (1 − 2 exp(−3.125))² − ½, one by 0.5 nearly ½."""
    frame = pd.DataFrame({"lr": [1] * 4 + [2] * 4, "error": [0.1] * 4 + [0.35] * 2 + [0.6] * 2})
    frame["x"] = [1.0] * 4 + [0.0] * 2 + [2.0] * 2  # wrong about the near ones
    columns = {"error": "error", "hyper_parameters": ["lr"], "measures": ["x"], "test_size": 100}
    near, far = ((1 - 2 * math.exp(-50 * gap**2)) ** 2 - 0.5 for gap in (0.25, 0.5))
    assert sign_error(Ledger.of(frame, **columns), "x").value == pytest.approx(near / (near + far), rel=1e-12)
    few = sign_error(Ledger.of(frame, **{**columns, "test_size": 20}), "x")
    assert few.value is None  # none is sure enough
    assert "effective sample size of 12" in (few.reason or "")


@pytest.mark.parametrize("seeds", [3, 4])
def test_environments_need_four_seeds(seeds: int) -> None:
    rows = [(lr, seed, lr + 0.01 * seed, lr) for lr in (0.1, 0.5) for seed in range(seeds)]
    frame = pd.DataFrame(rows, columns=["lr", "seed", "x", "error"])
    found = sign_error(Ledger.of(frame, error="error", hyper_parameters=["lr"], measures=["x"]), "x")
    assert found.value == (0.0 if seeds == 4 else None)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.__name__)
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"x": 1.0}, "the measure is the same at all minima"),
        ({"error": 0.5}, "the error is the same at all minima"),
    ],
)
def test_constants_order_nothing(protocol: Protocol, changed: dict[str, float], reason: str) -> None:
    found = protocol(ledger_of(random_frame(2, seeds=4).assign(**changed)), "x")
    assert (found.value, found.interval, found.reason) == (None, None, reason)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.__name__)
def test_two_minima_are_too_few(protocol: Protocol) -> None:
    frame = pd.DataFrame({"lr": [1, 2], "optimizer": ["a", "a"], "x": [1.0, 2], "loss": [1.0, 2], "error": [0.1, 0.2]})
    found = protocol(ledger_of(frame), "x")
    assert (found.value, found.n, found.reason) == (None, 2, "2 minima are too few, it takes 3")


@pytest.mark.parametrize(
    ("protocol", "columns", "reason"),
    [
        (kendall_of_settings, {"hyper_parameters": []}, "no hyper-parameters are named"),
        (granulated_kendall, {"hyper_parameters": []}, "no hyper-parameters are named"),
        (conditional_mutual_information, {"hyper_parameters": []}, "no hyper-parameters are named"),
        (sign_error, {"hyper_parameters": []}, "no hyper-parameters are named"),
        (kendall_of_settings, {"hyper_parameters": ["one"]}, "all minima are of one setting"),
        (granulated_kendall, {"hyper_parameters": ["one"]}, "no two minima differ in a single hyper-parameter"),
        (granulated_kendall, {"seed": "row"}, "every row is of one setting alone, so that it pairs no"),
        (granulated_kendall, {"seed": "seed", "hyper_parameters": ["one"]}, "no two minima of one seed differ in a "),
        (sign_error, {"hyper_parameters": ["one"]}, "no two settings differ in one hyper-parameter alone"),
        (sign_error, {"error": "percent"}, "errors outside of 0 to 1"),
        (sign_error, {"error": None, "accuracy": "percent"}, "errors outside of 0 to 1"),
        (conditional_mutual_information, {"hyper_parameters": ["one", "row"]}, ""),
        (partial_kendall, {"given": None}, "no column is named that the measure must add to"),
        (partial_kendall, {"given": "x"}, "x is what is given"),
        (partial_kendall, {"given": "one"}, "one is the same at all minima"),
    ],
)
def test_what_is_not_defined_is_named(protocol: Protocol, columns: dict[str, object], reason: str) -> None:
    frame = random_frame(4, seeds=4).assign(one=1.0, row=range(24), percent=lambda frame: 100 * frame["error"])
    found = protocol(ledger_of(frame, **columns), "x")
    if reason:
        assert found.value is None
        assert (found.reason or "").startswith(reason)
    else:
        assert found.value is not None  # the pairs as a whole have entropy, though each is alone with its rows


def test_means_of_settings_are_tied_whatever_the_order_of_their_sums() -> None:
    """0.1 + 0.2 + 0.3 and its reverse differ in the last bit."""
    frame = pd.DataFrame({"lr": [1] * 3 + [2] * 3 + [3] * 3, "x": [0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 5.0, 6.0, 7.0]})
    ledger = Ledger.of(frame.assign(error=[1.0, 1, 1, 2, 2, 2, 3, 3, 3]), error="error", hyper_parameters=["lr"])
    expected = stats.kendalltau([1, 1, 2], [1, 2, 3]).statistic
    assert kendall_of_settings(ledger, "x").value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_means_of_settings_keep_their_order_over_many_decades(sign: float) -> None:
    """Which are tied is a matter of the two, whatever else the column holds."""
    means = [1e-150, 2e-150, 3e-20, 1.0, 1.0 + 1e-9, 1e150]
    frame = pd.DataFrame({"lr": np.repeat(range(6), 3), "x": sign * np.outer(means, [0.5, 1.0, 1.5]).ravel()})
    ledger = Ledger.of(frame.assign(error=np.repeat(range(1, 7), 3)), error="error", hyper_parameters=["lr"])
    assert kendall_of_settings(ledger, "x").value == sign


def test_means_of_settings_that_cancel_are_tied_where_rounding_alone_parts_them() -> None:
    """Of 0.1 + 0.2 − 0.3 there remains what the sum was rounded by, and of other orders, nothing."""
    x = [0.1, 0.2, -0.3, -0.3, 0.2, 0.1, 5.0, 6.0, 7.0]
    assert sum(x[:3]) != sum(x[3:6])
    frame = pd.DataFrame({"lr": [1] * 3 + [2] * 3 + [3] * 3, "x": x, "error": [1.0, 1, 1, 2, 2, 2, 3, 3, 3]})
    ledger = Ledger.of(frame, error="error", hyper_parameters=["lr"])
    expected = stats.kendalltau([1, 1, 2], [1, 2, 3]).statistic
    assert kendall_of_settings(ledger, "x").value == pytest.approx(expected, rel=1e-12)


def test_errors_and_accuracies_are_the_same_turned_round() -> None:
    frame = random_frame(5, seeds=5).assign(accuracy=lambda frame: 1 - frame["error"])
    for protocol in PROTOCOLS:
        of_error = protocol(ledger_of(frame), "x")
        of_accuracy = protocol(ledger_of(frame, error=None, accuracy="accuracy"), "x")
        assert of_error.value == pytest.approx(of_accuracy.value, rel=1e-12)
