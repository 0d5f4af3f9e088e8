from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flatminima.errors import UndefinedMeasureError
from support.minima import fitted, network, value_of
from support.oracles import explicit_jacobian

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")


def same_direction() -> tuple[torch.nn.Module, tuple[Tensor, Tensor], Tensor]:
    """Samples that all pull the same way: one class, inputs of one sign. And their gradients."""
    model, x, y = network()
    x, y = x.abs(), torch.zeros_like(y)
    return model, (x, y), explicit_jacobian(model, x, y)


def test_variance_is_the_trace_of_the_unbiased_covariance() -> None:
    model, x, y = network()
    expected = explicit_jacobian(model, x, y).var(0).sum().item()
    assert value_of("gradient_variance", model, (x, y)) == pytest.approx(expected, rel=1e-9)


def test_noise_scale_is_that_of_a_batch_of_one_and_a_batch_of_all() -> None:
    """McCandlish et al. estimate ‖G‖² and tr Σ by the squared gradient norms of a small batch and a large one."""
    model, data, rows = same_direction()
    n = len(rows)
    small, large = rows.square().sum(1).mean(), rows.mean(0).square().sum()
    gradient, noise = (n * large - small) / (n - 1), (small - large) / (1 - 1 / n)
    assert value_of("gradient_noise_scale", model, data) == pytest.approx((noise / gradient).item(), rel=1e-9)
    assert value_of("gradient_signal_to_noise", model, data) == pytest.approx((gradient / noise).item(), rel=1e-9)


def test_noise_scale_is_nan_exactly_where_the_mean_gradient_is_less_than_two_jackknife_errors_above_zero() -> None:
    def squared_mean(rows: Tensor) -> float:
        n = len(rows)
        return ((rows.sum(0).square().sum() - rows.square().sum()) / (n * (n - 1))).item()

    known = 0
    for seed in range(6):
        model, x, y = network()
        torch.manual_seed(seed)
        x, y = x + seed / 3, y.where(torch.rand(12) > seed / 6, 0)
        rows = explicit_jacobian(model, x, y)
        left_out = torch.tensor([squared_mean(torch.cat([rows[:i], rows[i + 1 :]])) for i in range(12)])
        error = (11 / 12 * (left_out - left_out.mean()).square().sum()).sqrt().item()
        value = value_of("gradient_noise_scale", model, (x, y))
        assert math.isnan(value) == (squared_mean(rows) <= 2 * error)
        known += not math.isnan(value)
    assert 0 < known < 6


def test_one_sample_has_no_variance() -> None:
    model, x, y = network()
    for measure in ("gradient_variance", "gradient_signal_to_noise", "gradient_noise_scale"):
        assert math.isnan(value_of(measure, model, (x, y), subset_size=1))


def test_gradients_that_are_no_samples_own_are_refused() -> None:
    model, x, y = fitted(1e-2)
    for options, reason in (
        ({"fisher": "model"}, "use fisher='empirical'"),
        ({"batchnorm": 6}, "use batchnorm='eval'"),
    ):
        with pytest.raises(UndefinedMeasureError, match=f"gradient_variance is not defined here: .*{reason}"):
            value_of("gradient_variance", model, (x, y), **options)


def test_an_exact_fisher_of_two_classes_is_refused_though_it_has_a_row_per_sample() -> None:
    model, x, y = network()
    model[2] = torch.nn.Linear(8, 2).double()
    with pytest.raises(UndefinedMeasureError, match="fisher='empirical'"):
        value_of("coherence", model, (x, y % 2), fisher="model")
