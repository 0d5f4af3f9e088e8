from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.exact import exact_fisher, exact_gamma
from flatminima.gramian.engine import gram
from flatminima.losses import CrossEntropy
from flatminima.measures.measuring import measure
from flatminima.measures.results import Characterization
from flatminima.theory import (
    fia_criterion,
    fia_criterion_of,
    gamma_from_subsets,
    gamma_of,
    pac_bayes_bound,
    pac_bayes_bound_of,
)
from support.oracles import explicit_jacobian
from support.small_networks import number_of_parameters, pinned_linear, trained_network

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


def test_bound_leaves_out_a_factor_of_its_proof() -> None:
    """App. B: the height of the ellipsoid of volume V over the minimum is W^{1/W} A, up to Stirling's approximation."""
    W, log_volume, gamma, N = 10, -3.0, 4.0, 10**30
    log_height = 2 / W * (log_volume + math.lgamma(W / 2 + 1)) + gamma / W - math.log(2 * math.pi)
    A = pac_bayes_bound(
        log_det_fisher=gamma, num_parameters=W, num_samples=N, train_loss=0, log_volume=log_volume, delta=1
    )
    assert math.exp(log_height) / A == pytest.approx(10 ** (1 / 10), rel=1e-2)


def test_fia_is_the_printed_formula() -> None:
    """Sec. 5.1.1, with the likelihood taken over the joint p(x, c) = f(x)_c / N of soft labels."""
    torch.manual_seed(0)
    N, W = 50, 12
    f, y = torch.randn(N, 3).double().softmax(1), torch.randn(N, 3).double().softmax(1)
    determinant, volume = 3e-5, 0.02
    likelihood = -(y * (f / N).log()).sum().item()
    expected = likelihood + W / 2 * math.log(N / (2 * math.pi)) + math.log(volume * math.sqrt(determinant))
    fia = fia_criterion(
        log_det_fisher=math.log(determinant),
        num_parameters=W,
        num_samples=N,
        train_loss=-(y * f.log()).sum(1).mean().item(),
        log_volume=math.log(volume),
    )
    assert fia == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"log_det_fisher": -math.inf}, "log_det_fisher must be finite"),
        ({"log_volume": math.nan}, "log_volume must be finite"),
        ({"num_parameters": 0}, "num_parameters must be"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"train_loss": -0.1}, "train_loss must be"),
    ],
)
def test_fia_refuses(wrong: dict[str, Any], message: str) -> None:
    valid = {name: value for name, value in VALID.items() if name != "delta"}
    with pytest.raises(FlatminimaError, match=message):
        fia_criterion(**valid | wrong)


NO_NUMBERS: list[Any] = ["20", [20], None, True, 1j, torch.tensor([20.0, 3.0])]
FUNCTIONS: list[tuple[Callable[..., float], dict[str, Any]]] = [
    (pac_bayes_bound, VALID),
    (fia_criterion, {name: value for name, value in VALID.items() if name != "delta"}),
    (gamma_from_subsets, {"gamma_hat": -3.0, "num_parameters": 20, "subset_size": 5, "rows_per_sample": 2}),
]
COUNTS = ("num_parameters", "num_samples", "subset_size", "rows_per_sample")


@pytest.mark.parametrize(
    ("function", "valid", "name"),
    [(function, valid, name) for function, valid in FUNCTIONS for name in valid],
)
def test_theory_refuses_what_is_no_number(function: Callable[..., float], valid: dict[str, Any], name: str) -> None:
    function(**valid)
    kind = "an integer" if name in COUNTS else "a number"
    for wrong in NO_NUMBERS:
        with pytest.raises(FlatminimaError, match=f"{name} must be {kind}, got "):
            function(**valid | {name: wrong})
    for wrong in (math.nan, math.inf, -math.inf, *([] if name in COUNTS else [10**400])):
        with pytest.raises(FlatminimaError, match=f"{name} must "):
            function(**valid | {name: wrong})


@pytest.mark.parametrize(("function", "valid"), FUNCTIONS)
def test_theory_counts_with_numpys_numbers_as_with_pythons(
    function: Callable[..., float], valid: dict[str, Any]
) -> None:
    """Twice a sample count of 32 bits could overflow, and floats of 16 round."""
    large = valid | {name: 2**31 - 1 for name in valid if name in ("num_samples", "num_parameters")}
    numpys = {
        name: np.int32(value) if name in COUNTS else np.float16(value) if name == "log_volume" else np.float64(value)
        for name, value in large.items()
    }
    assert function(**numpys) == function(**large)


@pytest.mark.parametrize("wrong", ["results.json", {"log_det_fisher": -3.0}, -3.0, None])
def test_theory_of_a_minimum_refuses_what_was_not_measured(wrong: Any) -> None:
    for function in (
        gamma_of,
        functools.partial(pac_bayes_bound_of, log_volume=0.0, delta=0.1),
        functools.partial(fia_criterion_of, log_volume=0.0),
    ):
        with pytest.raises(FlatminimaError, match="take what measure returned, a Characterization, got"):
            function(wrong)


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


@functools.cache
def minimum_of_37() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network, as many inputs as it has parameters, and the classes it gives them."""
    model, x, _ = trained_network(37)
    return model, x, model(x).argmax(1)


@functools.cache
def xi_of_37() -> Tensor:
    return gram(*minimum_of_37())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 36), min_size=1, max_size=36, unique=True))
def test_eigenvalues_of_a_subset_interlace(subset: list[int]) -> None:
    """App. C, Theorem 3: ξ of a subset is a principal submatrix of ξ, and λ_r ≤ ν_r ≤ λ_{r+n−k}."""
    model, x, y = minimum_of_37()
    whole, part = xi_of_37(), gram(model, x[subset], y[subset])
    assert torch.allclose(part, whole[subset][:, subset], rtol=1e-10, atol=1e-12 * whole.abs().max().item())
    larger, smaller = torch.linalg.eigvalsh(whole), torch.linalg.eigvalsh(part)
    n, k = len(larger), len(smaller)
    rounding = n * torch.finfo(torch.float64).eps * larger[-1]
    assert (larger[:k] <= smaller + rounding).all()
    assert (smaller <= larger[n - k :] + rounding).all()


def estimates_by_size(J: Tensor, size: int) -> Tensor:
    """The estimate of γ from every single subset of ``size`` rows of J."""
    subsets = torch.tensor(list(itertools.combinations(range(len(J)), size)))
    log_dets = 2 * torch.linalg.svdvals(J[subsets]).log().sum(1)
    W = J.shape[1]
    values = [gamma_from_subsets(value, num_parameters=W, subset_size=size) for value in log_dets.tolist()]
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_estimate_falls_from_the_trace_bound_to_gamma(seed: int) -> None:
    """Eq. 5 over all subsets of the imagined W samples: non-increasing in N' (Szász), exact at N' = W alone."""
    model, x = pinned_linear(8, seed=seed)
    y = model(x).argmax(1)
    J, fisher = explicit_jacobian(model, x, y), exact_fisher(model, x, y)
    means = [estimates_by_size(J, size).mean().item() for size in range(1, 9)]
    assert means[0] <= 8 * (math.log(fisher.trace()) - math.log(8)) + 1e-9
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(means))
    assert means[0] > means[-1] + 1
    assert means[-1] == pytest.approx(exact_gamma(model, x, y), abs=1e-6)


def test_estimate_from_more_samples_than_parameters_ends_below_gamma() -> None:
    """ln det is concave; it is the mean determinant that is right (Cauchy-Binet), not the mean of its logarithm."""
    model, x = pinned_linear(12)
    y = model(x).argmax(1)
    W, N, gamma = 8, len(x), exact_gamma(model, x, y)
    estimates = estimates_by_size(explicit_jacobian(model, x, y), W)
    assert estimates.mean() < gamma - 1
    log_mean_det = estimates.logsumexp(0).item() - math.log(len(estimates)) + W * math.log(W)
    assert math.log(math.comb(N, W)) + log_mean_det - W * math.log(N) == pytest.approx(gamma, abs=1e-8)


def test_more_trials_do_not_remove_the_bias() -> None:
    """T → ∞ at fixed N' converges to the mean over all subsets, within its standard error, and not to γ."""
    model, x = pinned_linear(8)
    y = model(x).argmax(1)
    expected = estimates_by_size(explicit_jacobian(model, x, y), 4).mean().item()
    c = measured(model, x, y, subset_size=4, trials=150)
    error = 8 / 4 * c.log_det_fisher.standard_error
    assert error < 0.5
    assert abs(gamma_of(c) - expected) < 5 * error
    assert gamma_of(c) - exact_gamma(model, x, y) > 10 * error


def measured(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Characterization:
    """Measured at a network that classifies all samples rightly, so none of it warns."""
    return measure(model, (x, y), measures=(), progress=False, **options)


def test_estimate_converges_to_exact_gamma_as_subsets_grow() -> None:
    """Eq. 5 at a trained minimum of 37 parameters, by ``measure`` itself: nats per parameter above the exact γ."""
    model, x, y = minimum_of_37()
    exact, W = exact_gamma(model, x, y), number_of_parameters(model)
    assert W == len(x) == 37
    sizes = (1, 4, 8, 16, 24, 32, 36, 37)
    bias = [(gamma_of(measured(model, x, y, subset_size=size, trials=12)) - exact) / W for size in sizes]
    assert bias == sorted(bias, reverse=True)
    assert bias[0] > 2
    assert bias[-2] < 0.1 * bias[0]
    assert bias[-1] == pytest.approx(0, abs=1e-5)  # ξ's condition number is 1e14: float64 leaves 1e-4 of its ln det


@pytest.fixture(scope="module")
def characterization() -> Characterization:
    return measured(*minimum_of_37(), subset_size=10, trials=5)


def test_theory_of_a_characterization(characterization: Characterization) -> None:
    c = characterization
    gamma = gamma_from_subsets(c.log_det_fisher.mean, num_parameters=37, subset_size=10)
    known = {"num_parameters": 37, "num_samples": 37, "train_loss": c.train_loss, "log_volume": -80.0}
    assert gamma_of(c) == gamma
    assert pac_bayes_bound_of(c, log_volume=-80.0, delta=0.1) == pac_bayes_bound(
        log_det_fisher=gamma, delta=0.1, **known
    )
    assert fia_criterion_of(c, log_volume=-80.0) == fia_criterion(log_det_fisher=gamma, **known)


def test_theory_orders_minima_as_their_measure_does(characterization: Characterization) -> None:
    c = characterization
    flatter = dataclasses.replace(
        c, log_det_fisher=dataclasses.replace(c.log_det_fisher, mean=c.log_det_fisher.mean - 5)
    )
    assert gamma_of(flatter) < gamma_of(c)
    assert pac_bayes_bound_of(flatter, log_volume=0, delta=0.1) < pac_bayes_bound_of(c, log_volume=0, delta=0.1)
    assert fia_criterion_of(flatter, log_volume=0) < fia_criterion_of(c, log_volume=0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Called as the plain one is, and another."""
    return 2 * F.cross_entropy(logits, targets, reduction="none")


def test_theory_knows_the_plain_loss_by_its_form(characterization: Characterization) -> None:
    by_instance = measured(*minimum_of_37(), subset_size=10, trials=5, loss=CrossEntropy())
    assert gamma_of(by_instance) == gamma_of(characterization)
    earlier = dataclasses.replace(characterization.settings, loss_form=None)  # of a version that knew names alone
    assert gamma_of(dataclasses.replace(characterization, settings=earlier)) == gamma_of(characterization)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": cross_entropy}, r"loss='cross_entropy' \(<function cross_entropy>\)"),
        ({"logit_normalization": 0.04}, "logit_normalization=0.04.*measure with logit_normalization=None"),
        ({"scale_invariant": True}, "scale_invariant=True.*measure with scale_invariant=False"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss='CrossEntropyLoss'.*loss='cross_entropy'"),
        ({"batchnorm": 5}, "batchnorm=5.*batchnorm='eval'"),
    ],
)
def test_theory_refuses_other_determinants(options: dict[str, Any], message: str) -> None:
    c = measured(*minimum_of_37(), subset_size=10, trials=2, **options)
    for function in (
        gamma_of,
        functools.partial(pac_bayes_bound_of, log_volume=0.0, delta=0.1),
        functools.partial(fia_criterion_of, log_volume=0.0),
    ):
        with pytest.raises(FlatminimaError, match=message):
            function(c)


@pytest.mark.parametrize("loss", [np.array(0.1), torch.tensor(0.1, dtype=torch.float64), np.float64(0.1)])
def test_numbers_may_come_in_arrays_and_tensors_without_dimensions(loss: Any) -> None:
    options = {"log_det_fisher": 1.0, "num_parameters": 10, "log_volume": 0.0}
    plain = fia_criterion(train_loss=0.1, num_samples=100, **options)
    assert fia_criterion(train_loss=loss, num_samples=np.int64(100), **options) == plain
    with pytest.raises(FlatminimaError, match="num_samples is larger than any float"):
        fia_criterion(train_loss=0.1, num_samples=10**400, **options)
