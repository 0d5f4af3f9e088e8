"""The product of the layers' spectral norms, in logarithms."""

from __future__ import annotations

import math

import torch

from flatminima.errors import UndefinedMeasureError
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.measures.weights import weight_tensors


@catalogued("ln Π spectral norms²", cost="weights", source="Jiang et al. 2020, App. C; Bartlett et al. 2017")
def log_spectral_product(trial: Trial) -> float:
    """Σ_l ln ‖W_l‖₂² over every layer's weight W_l as a matrix.

    The kernel of a convolution is the matrix (outputs, inputs × positions), as in Jiang et al.: that is not the norm of
    the convolution as an operator on images, which depends on their size. Their division by the number of samples is
    left out: it is the same for all minima.

    Raises:
        UndefinedMeasureError: if a weight is all zero; see also :func:`~flatminima.measures.weights.weight_tensors`.
    """
    logarithms = []
    for name, weight in weight_tensors(trial).items():
        norm = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
        if norm == 0:
            raise UndefinedMeasureError(f"parameter {name!r} is all zero, so that the logarithm of its norm is −∞")
        logarithms.append(2 * math.log(norm))
    return math.fsum(logarithms)
