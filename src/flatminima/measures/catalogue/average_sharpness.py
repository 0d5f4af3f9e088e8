"""By how much the loss grows on average where the weights are perturbed, to second order."""

from __future__ import annotations

from flatminima.errors import UndefinedMeasureError
from flatminima.gramian import FactoredGram
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial

RADIUS = 0.1
"""ρ. Its square is a factor of both measures, and orders no two minima differently."""

_SOURCE = "Andriushchenko et al. 2023, to second order"


@catalogued("average sharpness", cost="free", source=_SOURCE)
def average_sharpness(trial: Trial) -> float:
    """½ρ² tr F, ρ = 0.1: E L(w + ε) − L(w) over ε ~ N(0, ρ²), where the Hessian is the Fisher information.

    It is at a minimum (Eq. 1). With ``fisher="model"`` it is F that counts everywhere: F is then the generalized
    Gauss–Newton matrix, whose trace is the Hessian's for ReLU networks without normalization. No Hessian sees kinks,
    though: a perturbation beyond the nearest one may change the loss by something else entirely.
    """
    if trial.options.scale_invariant:
        raise UndefinedMeasureError("of gradients weighted by |w| it is the adaptive one")
    return _growth(trial, trial.gram)


@catalogued("average sharpness, adaptive", cost="costly", source=_SOURCE)
def adaptive_average_sharpness(trial: Trial) -> float:
    """½ρ² Σ_j w_j² F_jj, ρ = 0.1: E L(w + |w|ε) − L(w) over ε ~ N(0, ρ²), as above; it takes ξ a second time.

    With ``scale_invariant=True`` ξ itself is of J diag(|w|), and the measure free.
    """
    return _growth(trial, trial.adaptive_gram)


def _growth(trial: Trial, gram: FactoredGram) -> float:
    trace = (gram.unit.diagonal() * (2 * gram.log_scale).exp()).sum().item()
    return RADIUS**2 / 2 * trace / len(trial.targets)
