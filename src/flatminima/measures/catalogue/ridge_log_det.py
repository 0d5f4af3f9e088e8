"""The Occam factor of the Laplace approximation: γ̂ with a prior, which no singular ξ stops."""

from __future__ import annotations

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial

PRIOR_PRECISION = 1.0
"""That of the Gaussian prior over every weight, as in Immer et al. and in their library before it is tuned."""


@catalogued("ridge log-determinant", cost="free", source="Immer et al. 2021, evidence by Laplace")
def ridge_log_det(trial: Trial) -> float:
    """Σ ln(1 + λ/σ²) = ln det(1 + ξ/σ²), with σ² = N'/N times the prior's precision, 1.

    The evidence of a model by Laplace's method is its log-likelihood less half the log-determinant of posterior against
    prior precision, ln det(1 + Σ_N g gᵀ). The subset's gradients stand for those of all N samples, each for N/N'.
    """
    scale = trial.num_samples / (len(trial.targets) * PRIOR_PRECISION)
    return (trial.spectrum * scale).log1p().sum().item()
