"""The length of the weights in the Fisher information's own metric."""

from __future__ import annotations

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial


@catalogued("Fisher–Rao norm²", cost="pass", source="Liang et al. 2019")
def fisher_rao_norm(trial: Trial) -> float:
    """wᵀFw = mean_i (g_i·w)², F = mean_i g_i g_iᵀ: unchanged where one layer is rescaled and the next undoes it."""
    products = trial.unit_weight_products * trial.gram.log_scale.exp()
    return products.square().mean().item()
