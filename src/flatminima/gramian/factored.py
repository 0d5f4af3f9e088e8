"""ξ in factored form, and ln det ξ of it and its parts, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.errors import RankDeficientError


@dataclass(frozen=True)
class LogDeterminant:
    """ln det ξ, exactly taken apart.

    A row of J is g_i = ‖δ_i‖ h_i, with δ_i the loss's gradient at the logits and h_i what δ_i/‖δ_i‖ back-propagates to;
    C_ij = cos(g_i, g_j). Then ln det ξ = Σ 2 ln‖δ_i‖ + Σ 2 ln‖h_i‖ + ln det C. Rescaling any sample's loss changes the
    first part alone.

    Attributes:
        residual: Σ 2 ln‖δ_i‖, how far the outputs are from the labels: the training loss in other clothes.
        sensitivity: Σ 2 ln‖h_i‖, how strongly the weights feel a unit error at the logits.
        diversity: ln det C ≤ 0, the log-volume of the unit gradients.
    """

    residual: float
    sensitivity: float
    diversity: float

    @property
    def at_unit_residuals(self) -> float:
        """Sensitivity + diversity = ln det of the Gram matrix of the h_i."""
        return self.sensitivity + self.diversity

    @property
    def total(self) -> float:
        """The logarithm of det ξ."""
        return self.residual + self.at_unit_residuals


def log_determinant(factored: FactoredGram, names: Sequence[int] | None = None) -> float:
    """Natural logarithm of det ξ (Eq. 5); the sum of :func:`log_determinant_parts`, and its errors."""
    return log_determinant_parts(factored, names).total


def log_determinant_parts(factored: FactoredGram, names: Sequence[int] | None = None) -> LogDeterminant:
    """The logarithm of det ξ and its parts, from the factored form: no under- or overflow, no −∞.

    ξ = S C S with C of unit diagonal, so ln det ξ = Σ ln C's eigenvalues + 2 Σ ln S_i: the eigenvalues are taken of the
    well-scaled part alone.

    Args:
        factored: ξ in factored form.
        names: the sample that each row is of (its index in the data), for messages; default 0..N'−1.

    Raises:
        RankDeficientError: if ξ is singular to the network's precision; names the samples and the rank.
    """
    n = len(factored.unit)
    names = list(names) if names is not None else list(range(n))
    squared = factored.unit.diagonal()
    zero = (~(squared > 0) | factored.log_scale.isneginf()).nonzero().flatten().tolist()
    if zero:
        raise RankDeficientError(
            f"samples {list(dict.fromkeys(names[i] for i in zero))[:5]} have zero gradient, so ξ is singular "
            f"(rank at most {n - len(zero)} of {n}): check for dead units or unused inputs"
        )
    correlation = factored.correlation()
    eigenvalues, rank = _spectrum_and_rank(correlation, factored.dtype)
    if rank < n:
        raise RankDeficientError(
            f"ξ is singular (rank {rank} of {n}): {_singularity(correlation, names, factored.dtype)}"
        )
    return LogDeterminant(
        residual=float(2 * factored.log_scale.sum()),
        sensitivity=float(2 * squared.sqrt().log().sum()),
        diversity=float(eigenvalues.log().sum()),
    )


def _singularity(correlation: Tensor, names: Sequence[int], dtype: torch.dtype) -> str:
    """Why a Gram matrix of unit diagonal is singular, and what to do about it."""
    same = (correlation.abs() > 1 - 100 * torch.finfo(dtype).eps).triu(1).nonzero().tolist()
    pairs = dict.fromkeys(f"{names[i]} and {names[j]}" for i, j in same if names[i] != names[j])
    if pairs:
        named = ", ".join(list(pairs)[:5])
        return f"samples {named} have the same gradient up to scale (duplicates): remove one of each from the data"
    if dtype == torch.float32:
        return (
            "its smallest eigenvalues are lost in float32: measure copy.deepcopy(model).double(), or lower subset_size"
        )
    return "its gradients are linearly dependent: lower subset_size"


def numerical_rank(factored: FactoredGram) -> int:
    """The rank of ξ to the network's precision; samples of zero gradient count as dependent."""
    squared = factored.unit.diagonal()
    kept = (squared > 0) & ~factored.log_scale.isneginf()
    if not kept.any():
        return 0
    return _spectrum_and_rank(_correlation(factored.unit[kept][:, kept]), factored.dtype)[1]


def _correlation(unit: Tensor) -> Tensor:
    norms = unit.diagonal().sqrt()
    return unit / norms[:, None] / norms


def _spectrum_and_rank(correlation: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Eigenvalues of a Gram matrix of unit diagonal, and how many stand out of rounding in ``dtype``."""
    eigenvalues = torch.linalg.eigvalsh(correlation)
    tolerance = len(correlation) * torch.finfo(dtype).eps * eigenvalues[-1]
    return eigenvalues, int((eigenvalues > tolerance).sum())


@dataclass(frozen=True)
class FactoredGram:
    """ξ in factored form: ξ_ij = exp(log_scale_i + log_scale_j) · unit_ij.

    Attributes:
        unit: (N', N') float64, the Gram matrix of the gradients with the logits' gradient scaled to norm one.
        log_scale: (N',) float64, the logarithms of the logits' gradients' norms.
        loss: (N',) float64, the per-sample losses.
        generic_parameters: names of the parameters that took the generic path.
        dtype: the network's floating-point type, which limits the accuracy of ``unit``.
        shares: every parameter's part of ``unit`` by name, where asked for; they add up to it.
    """

    unit: Tensor
    log_scale: Tensor
    loss: Tensor
    generic_parameters: tuple[str, ...]
    dtype: torch.dtype
    shares: dict[str, Tensor] | None = None

    def correlation(self) -> Tensor:
        """(N', N') float64: the cosines of the gradients; NaN for one of zeros."""
        return _correlation(self.unit)

    def matrix(self) -> Tensor:
        """ξ itself, (N', N') float64. Entries below 1e-308 underflow to zero; the factored form never does."""
        scale = self.log_scale.exp()
        return self.unit * scale[:, None] * scale
