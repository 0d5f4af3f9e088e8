"""The trace of the Fisher information, which the regularizer penalizes."""

from __future__ import annotations

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial


@catalogued("trace of the Fisher", cost="free", source="Jia & Su 2020, Sec. 6", paper=True)
def fisher_trace(trial: Trial) -> float:
    """mean_i ‖∇ℓ_i‖² = tr ξ / N'."""
    return trial.xi.trace().item() / len(trial.targets)
