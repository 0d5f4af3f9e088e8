from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flatminima.errors import FlatminimaError
from flatminima.theory import gamma_from_subsets, pac_bayes_bound

VALID: dict[str, Any] = {
    "log_det_fisher": -40.0,
    "num_parameters": 20,
    "num_samples": 1000,
    "train_loss": 0.01,
    "log_volume": -3.0,
    "delta": 0.05,
}

arguments = st.fixed_dictionaries(
    {
        "log_det_fisher": st.floats(-1e9, 1e3),
        "num_parameters": st.integers(1, 10**8),
        "num_samples": st.integers(2, 10**9),
        "train_loss": st.floats(0, 20),
        "log_volume": st.floats(-1e9, 1e3),
        "delta": st.floats(1e-300, 1),
    }
)


def direct_formula(
    *, log_det_fisher: float, num_parameters: int, num_samples: int, train_loss: float, log_volume: float, delta: float
) -> Any:
    """Theorem 1 as printed, with V and det I themselves, in 60 digits and unbounded exponents."""
    with mpmath.workdps(60):
        W, N, L0 = mpmath.mpf(num_parameters), mpmath.mpf(num_samples), mpmath.mpf(train_loss)
        V, determinant = mpmath.exp(mpmath.mpf(log_volume)), mpmath.exp(mpmath.mpf(log_det_fisher))
        A = W * V ** (2 / W) * mpmath.pi ** (1 / W) * determinant ** (1 / W) / (4 * mpmath.pi * mpmath.e)
        return L0 + A + 2 * mpmath.sqrt((2 * L0 + 2 * A + mpmath.log(2 * N / mpmath.mpf(delta))) / (N - 1))


@given(arguments)
def test_bound_is_the_printed_formula(given_arguments: dict[str, Any]) -> None:
    expected = direct_formula(**given_arguments)
    bound = pac_bayes_bound(**given_arguments)
    if expected > mpmath.mpf(1.79e308):
        assert bound == math.inf
    else:
        assert bound == pytest.approx(float(expected), rel=1e-12 * max(1.0, abs(math.log(float(expected)))))


@pytest.mark.parametrize(
    "extremes",
    [
        {"num_parameters": 10**8, "log_det_fisher": -1e9, "log_volume": -1e9},
        {"num_parameters": 10**8, "log_det_fisher": 1e9, "log_volume": 1e9},
        {"num_parameters": 1, "log_det_fisher": -1e9, "log_volume": 0.0},
        {"num_parameters": 1, "log_det_fisher": 712.0, "log_volume": 0.0, "num_samples": 2},
    ],
)
def test_bound_at_extremes(extremes: dict[str, Any]) -> None:
    bound = pac_bayes_bound(**VALID | extremes)
    assert math.isfinite(bound)
    assert bound == pytest.approx(float(direct_formula(**VALID | extremes)), rel=1e-10)


def test_bound_beyond_the_largest_float_is_infinite() -> None:
    assert pac_bayes_bound(**VALID | {"num_parameters": 1, "log_det_fisher": 720.0}) == math.inf


@pytest.mark.parametrize(
    ("name", "sign"), [("log_det_fisher", 1), ("train_loss", 1), ("log_volume", 1), ("delta", -1), ("num_samples", -1)]
)
@given(data=st.data(), base=arguments)
def test_bound_is_monotone(name: str, sign: int, data: st.DataObject, base: dict[str, Any]) -> None:
    """A larger γ, loss or volume never lowers the bound; neither does a smaller δ or training set."""
    other = base | {name: data.draw(arguments)[name]}
    low, high = sorted((base, other), key=lambda values: sign * values[name])
    assert pac_bayes_bound(**low) <= pac_bayes_bound(**high) * (1 + 1e-13)


@given(base=arguments, gain=st.floats(1, 100))
def test_lower_gamma_strictly_lowers_the_bound(base: dict[str, Any], gain: float) -> None:
    """Sec. 5.2: a lower γ indicates a more generalizable minimum (where A is not negligible)."""
    base = base | {"num_parameters": 100, "log_volume": 0.0, "log_det_fisher": 50.0}
    lower = base | {"log_det_fisher": 50.0 - gain}
    assert pac_bayes_bound(**lower) < pac_bayes_bound(**base)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": 0.0}, "delta must lie in"),
        ({"delta": 1.5}, "delta must lie in"),
        ({"delta": math.nan}, "delta must lie in"),
        ({"log_det_fisher": -math.inf}, "log_det_fisher must be finite"),
        ({"log_det_fisher": math.nan}, "log_det_fisher must be finite"),
        ({"log_volume": math.inf}, "log_volume must be finite"),
        ({"num_parameters": 0}, "num_parameters must be"),
        ({"num_samples": 1}, "num_samples must be"),
        ({"train_loss": -0.1}, "train_loss must be"),
        ({"train_loss": math.nan}, "train_loss must be"),
    ],
)
def test_bound_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        pac_bayes_bound(**VALID | wrong)


def test_delta_of_one_is_allowed() -> None:
    assert pac_bayes_bound(**VALID | {"delta": 1}) == pytest.approx(float(direct_formula(**VALID | {"delta": 1})))


def test_gamma_is_exact_when_the_subset_is_the_imagined_training_set() -> None:
    """W samples, all drawn: ξ = J Jᵀ has the determinant of W · I(w0) = Jᵀ J (Eq. 4)."""
    torch.manual_seed(0)
    J = torch.randn(12, 12, dtype=torch.float64)
    gamma = torch.logdet(J.T @ J / 12).item()
    gamma_hat = torch.logdet(J @ J.T).item()
    assert gamma_from_subsets(gamma_hat, num_parameters=12, subset_size=12) == pytest.approx(gamma, rel=1e-12)


@given(st.integers(1, 10**8), st.integers(1, 1000), st.floats(-50, 50))
def test_gamma_is_exact_for_a_multiple_of_the_identity(num_parameters: int, subset_size: int, log_c: float) -> None:
    """I(w0) = c · 1 makes every ξ = W c · 1, so γ̂ = N' ln(W c), and γ = W ln c."""
    assume(subset_size <= num_parameters)
    gamma_hat = subset_size * (math.log(num_parameters) + log_c)
    gamma = gamma_from_subsets(gamma_hat, num_parameters=num_parameters, subset_size=subset_size)
    assert gamma == pytest.approx(num_parameters * log_c, rel=1e-9, abs=1e-12 * num_parameters)


@pytest.mark.parametrize(
    ("gamma_hat", "subset_size", "message"),
    [
        (-math.inf, 5, "gamma_hat must be finite"),
        (-3.0, 0, "subset_size must lie in"),
        (-3.0, 11, "subset_size must lie in"),
    ],
)
def test_gamma_refuses(gamma_hat: float, subset_size: int, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        gamma_from_subsets(gamma_hat, num_parameters=10, subset_size=subset_size)
