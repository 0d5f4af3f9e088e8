"""Whether steps along the samples' gradients would let the weights grow, or turn them."""

from __future__ import annotations

import math

import torch

from flatminima.errors import UndefinedMeasureError
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import in_float64


@catalogued("gradient–weight alignment", cost="pass", source="Hölzl et al. 2025", larger_is_better=True)
def weight_alignment(trial: Trial) -> float:
    """mean_i cos(−g_i, w) over all trainable weights w. Samples without a gradient are left out.

    The source divides the mean by the samples' kurtosis + 1.2, and takes the last layer alone where all cost too much.
    """
    if trial.options.scale_invariant:
        raise UndefinedMeasureError("gradients weighted by |w| have no angle with w: leave scale_invariant out")
    products = trial.unit_weight_products
    squares = [in_float64(weight.detach()).square().sum() for weight in trial.parameters.values()]
    norm = torch.stack(squares).sum().sqrt().to(products.device)
    cosines = -products / (trial.gram.unit.diagonal().sqrt() * norm)
    known = cosines[cosines.isfinite()]
    return known.mean().item() if len(known) else math.nan
