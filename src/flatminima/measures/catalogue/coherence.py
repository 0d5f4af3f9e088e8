"""How well the gradients of different samples agree in direction: overall, within classes and between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial


@catalogued("coherence", cost="free", source="Chatterjee 2020; Fort et al. 2019", larger_is_better=True)
def coherence(trial: Trial) -> float:
    """The mean of cos(g_i, g_j) over i ≠ j, in [−1/(N' − 1), 1]. Samples without a gradient are left out."""
    return _mean_cosine(trial, torch.ones_like(trial.xi, dtype=torch.bool))


@catalogued("  within classes", cost="free", source="Fort et al. 2019, stiffness", larger_is_better=True)
def coherence_within(trial: Trial) -> float:
    """The mean of cos(g_i, g_j) over pairs of one class; NaN where the subset has none."""
    return _mean_cosine(trial, _same_class(trial))


@catalogued("  between classes", cost="free", source="Fort et al. 2019, stiffness", larger_is_better=True)
def coherence_between(trial: Trial) -> float:
    """The mean of cos(g_i, g_j) over pairs of two classes; NaN where the subset has none."""
    return _mean_cosine(trial, ~_same_class(trial))


def _same_class(trial: Trial) -> Tensor:
    trial.require_labels()
    labels = trial.targets.to(trial.xi.device)
    return labels[:, None] == labels


def _mean_cosine(trial: Trial, chosen: Tensor) -> float:
    trial.require_gradients_of_samples()
    cosines = trial.correlation
    pairs = (chosen & ~cosines.isnan()).fill_diagonal_(False)
    return cosines[pairs].mean().item() if pairs.any() else math.nan
