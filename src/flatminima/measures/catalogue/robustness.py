"""The rival measure of Sokolić et al. (2017), the spectral norm of the network's input Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from flatminima.errors import UndefinedMeasureError
from flatminima.measures.input_jacobian import input_jacobian_norms, input_jacobian_passes
from flatminima.measures.registry import catalogued
from flatminima.measures.second_derivatives import PASSES_AT_ONCE
from flatminima.measures.trial import Trial

_PASSES = 2.5
"""A forward and backward pass of a sample takes as long as so many of its passes back to the input, or forward ones:
these take 0.37 to 0.4 of it (benchmarks/results/gram.json), the Gram matrices and small batches a little more."""


@catalogued("robustness", cost="pass", source="Jia & Su 2020, Sec. 7.1; Sokolić et al. 2017", paper=True)
def robustness(trial: Trial) -> float:
    """mean_i ‖J_x[f_w(x_i)]‖₂² over as many samples as the options say, or as one pass of the subset pays for.

    Raises:
        UndefinedMeasureError: for data, outputs or targets that have none, and where the options leave it out.
    """
    if trial.options.robustness_samples == 0:
        raise UndefinedMeasureError("robustness_samples=0 leaves it out")
    if not (isinstance(trial.inputs, Tensor) and trial.inputs.is_floating_point()):
        raise UndefinedMeasureError("the input is not one floating-point tensor")
    samples = robustness_sample_count(len(trial.targets), trial.require_classes(), trial.options.robustness_samples)
    parts = torch.split(trial.inputs[:samples], max(1, trial.samples_at_once // PASSES_AT_ONCE))
    return torch.cat([input_jacobian_norms(trial.model, part) for part in parts]).mean().item()


def robustness_sample_count(subset_size: int, classes: int, asked: int | None) -> int:
    """Of a subset, those that the robustness is computed on.

    Args:
        subset_size: N'.
        classes: K.
        asked: as the options have it; None: as many as cost a forward and backward pass of the subset.
    """
    wanted = max(1, int(_PASSES * subset_size / input_jacobian_passes(classes))) if asked is None else asked
    return min(wanted, subset_size)
