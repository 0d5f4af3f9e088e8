"""The heavy-tail exponent of Martin & Mahoney: how fast the tails of the layers' spectra fall."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from flatminima.errors import UndefinedMeasureError
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.measures.weights import weight_tensors

_LEAST_EIGENVALUES = 20
"""A fit to fewer says nothing; below so many weightwatcher fits in another way."""


@catalogued("heavy-tail exponent α", cost="weights", source="Martin & Mahoney 2021, JMLR 22 (weightwatcher)")
def heavy_tail_alpha(trial: Trial) -> float:
    """The mean over layers of α, where the tail of the density of WᵀW's eigenvalues is ∝ λ^(−α).

    A convolution's spectrum is that of its positions' matrices (outputs, inputs) together. Layers with fewer than
    twenty nonzero eigenvalues are left out. Smaller α, down to about 2, is heavier tails, and held to be better.

    Raises:
        UndefinedMeasureError: if no layer has so many; see also :func:`~flatminima.measures.weights.weight_tensors`.
    """
    spectra = [nonzero_eigenvalues(weight) for weight in weight_tensors(trial).values()]
    exponents = [tail_exponent(spectrum) for spectrum in spectra if len(spectrum) >= _LEAST_EIGENVALUES]
    if not exponents:
        raise UndefinedMeasureError(f"no layer's weight has {_LEAST_EIGENVALUES} eigenvalues, which a fit needs")
    return statistics.fmean(exponents)


def nonzero_eigenvalues(weight: Tensor) -> Tensor:
    """Of WᵀW over all positions of a kernel, ascending; zero is what rounding to float32 can make of it.

    Args:
        weight: (outputs, inputs, ...), float64.
    """
    matrices = weight.flatten(2).movedim(2, 0) if weight.dim() > 2 else weight[None]
    values = torch.linalg.svdvals(matrices)
    rounding = max(matrices.shape[1:]) * torch.finfo(torch.float32).eps
    kept: Tensor = values[values > rounding * values.max()].square().sort().values
    return kept


def tail_exponent(values: Tensor) -> float:
    """α of the power law p(x) ∝ x^(−α), x ≥ x_min, that fits the largest values best (Clauset et al. 2009).

    The maximum likelihood for every x_min, α = 1 + n / Σ ln(x/x_min) over the n values x ≥ x_min; and of these the one
    whose distribution function is nearest to the data's (Kolmogorov–Smirnov).

    Args:
        values: positive, ascending, two or more.
    """
    logarithms = values.log().cpu()
    best, found = torch.inf, torch.nan
    for first in range(len(values) - 1):
        excess = logarithms[first:] - logarithms[first]
        count = len(excess)
        exponent = count / excess.sum()  # α − 1
        fitted = -torch.expm1(-exponent * excess)
        observed = torch.arange(count, dtype=torch.float64, device="cpu") / count
        distance = (fitted - observed).abs().max().item()
        if distance < best:
            best, found = distance, 1 + exponent.item()
    return found
