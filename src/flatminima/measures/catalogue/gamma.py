"""γ̂, the measure of Jia & Su (2020), and the parts that it is made of."""

from __future__ import annotations

import math

from flatminima.gramian import LogDeterminant
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial

_SOURCE = "this library; docs/ideas/gamma.md"
_SINGULAR = LogDeterminant(math.nan, math.nan, math.nan)
"""Of a trial that has none."""


@catalogued("γ̂ = ln det ξ", cost="free", source="Jia & Su 2020, Eq. 5", paper=True)
def log_det_fisher(trial: Trial) -> float:
    """The natural logarithm of det ξ; NaN where ξ is singular."""
    return (trial.log_det or _SINGULAR).total


@catalogued("  residual: how well it fits", cost="free", source=_SOURCE, paper=True)
def residual(trial: Trial) -> float:
    """Σ 2 ln‖δ_i‖ of the losses' gradients δ_i at the logits; it follows the training loss."""
    return _parts(trial).residual


@catalogued("  sensitivity", cost="free", source=_SOURCE, paper=True)
def sensitivity(trial: Trial) -> float:
    """Σ 2 ln‖h_i‖, where h_i is what δ_i/‖δ_i‖ back-propagates to."""
    return _parts(trial).sensitivity


@catalogued("  diversity", cost="free", source=_SOURCE, paper=True)
def diversity(trial: Trial) -> float:
    """The logarithm of det C, at most 0, of the rows' cosines C_ij."""
    return _parts(trial).diversity


@catalogued("γ̂ at unit residuals", cost="free", source=_SOURCE, paper=True)
def log_det_unit_fisher(trial: Trial) -> float:
    """Sensitivity + diversity: γ̂ with the training loss taken out."""
    return _parts(trial).at_unit_residuals


def _parts(trial: Trial) -> LogDeterminant:
    trial.require_own_statistics()
    return trial.log_det or _SINGULAR
