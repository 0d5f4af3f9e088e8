"""How much the gradients of samples differ: their variance, and that beside the square of their mean."""

from __future__ import annotations

import math

from torch import Tensor

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial

_SOURCE = "McCandlish et al. 2018, App. A"

_ERRORS_ABOVE_ZERO = 2.0
"""The squared mean gradient counts as known where it is so many of its standard errors above zero."""


@catalogued("gradient variance", cost="free", source=_SOURCE)
def gradient_variance(trial: Trial) -> float:
    """The trace of their covariance, estimated without bias: s₁ − s₂ = mean ξ_ii − mean ξ_ij over i ≠ j.

    It equals Σ_i ‖g_i − ḡ‖² / (N' − 1).
    """
    trial.require_gradients_of_samples()
    return _mean_square(trial.xi) - _squared_mean(trial.xi)


@catalogued("gradient signal to noise", cost="free", source=_SOURCE + "; Liu et al. 2020", larger_is_better=True)
def gradient_signal_to_noise(trial: Trial) -> float:
    """‖G‖² / tr Σ = s₂ / (s₁ − s₂) per sample, the inverse of the noise scale.

    About zero at a minimum, and negative where s₂ is; unlike the noise scale it can be averaged over trials.
    """
    trial.require_gradients_of_samples()
    squared = _squared_mean(trial.xi)
    noise = _mean_square(trial.xi) - squared
    return squared / noise if noise > 0 else math.nan


@catalogued("gradient noise scale", cost="free", source=_SOURCE)
def gradient_noise_scale(trial: Trial) -> float:
    """The batch size at which noise and gradient G are of equal size, in samples: tr Σ / ‖G‖² = (s₁ − s₂) / s₂.

    At a minimum G vanishes, and s₂, its unbiased estimate, is noise about zero, even negative: a trial whose s₂ is less
    than two of its (jackknife) standard errors above zero has no noise scale, and its value is NaN. The trials that are
    left lean to large s₂, so that a mean over few of many is too small: its inverse has a mean over all of them.
    """
    trial.require_gradients_of_samples()
    squared = _squared_mean(trial.xi)
    if not squared > _ERRORS_ABOVE_ZERO * _error_of_squared_mean(trial.xi):
        return math.nan
    return (_mean_square(trial.xi) - squared) / squared


def _mean_square(xi: Tensor) -> float:
    """s₁."""
    return xi.diagonal().mean().item()


def _squared_mean(xi: Tensor) -> float:
    """s₂; NaN for a single sample."""
    pairs = len(xi) * (len(xi) - 1)
    return _sums_over_others(xi).sum().item() / pairs if pairs else math.nan


def _error_of_squared_mean(xi: Tensor) -> float:
    """The jackknife's standard error of s₂; never too small in expectation (Efron & Stein 1981)."""
    n = len(xi)
    if n < 3:
        return math.nan
    of_sample = _sums_over_others(xi)
    without_one = (of_sample.sum() - 2 * of_sample) / ((n - 1) * (n - 2))
    return ((n - 1) * without_one.var(correction=0)).sqrt().item()


def _sums_over_others(xi: Tensor) -> Tensor:
    return xi.sum(1) - xi.diagonal()
