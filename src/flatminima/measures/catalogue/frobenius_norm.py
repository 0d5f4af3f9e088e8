"""The squared Frobenius norm of the Fisher information: of single samples', and of the subset's."""

from __future__ import annotations

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial


@catalogued(
    "Frobenius norm² (per sample)", cost="free", source="Jia & Su 2020, App. D; Wu et al. 2017, exact", paper=True
)
def frobenius_norm(trial: Trial) -> float:
    """mean_i ‖F_i‖_F² of the samples' own Fisher information F_i: mean_i ξ_ii² where each has one row."""
    return trial.sample_blocks.square().sum().item() / len(trial.targets)


@catalogued("Frobenius norm² (Fisher)", cost="free", source="as above, of the subset's matrix itself", paper=True)
def fisher_frobenius_norm(trial: Trial) -> float:
    """‖(1/N') JᵀJ‖_F² = ‖ξ‖_F² / N'²."""
    return trial.xi.square().sum().item() / len(trial.targets) ** 2
