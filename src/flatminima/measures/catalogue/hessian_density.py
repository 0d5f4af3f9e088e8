"""How the eigenvalues of the Hessian are distributed, for networks of any size: stochastic Lanczos quadrature.

From a random unit vector v, m steps of Lanczos' recurrence give a tridiagonal matrix whose m eigenvalues θ_j and first
components u_j make the quadrature Σ u_j² f(θ_j) of vᵀ f(H) v: exact for polynomials of a degree below 2m, and with the
mean tr f(H)/W over v (Ubaru et al. 2017; for networks Ghorbani et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.errors import require
from flatminima.measures.hessian_products import Hessian, hessian_of
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial

STEPS = 30
"""Of the recurrence, a Hessian-vector product each; up to so many parameters the whole matrix is formed."""


@dataclass(frozen=True)
class SpectralDensity:
    """p(λ) = (1/W) Σ_i δ(λ − λ_i) over the W eigenvalues, as a quadrature rule.

    Attributes:
        eigenvalues: (n,) float64, ascending. The outermost are close to eigenvalues; those within stand for many.
        weights: (n,) float64: the share of the W eigenvalues that each stands for; they add up to 1.
    """

    eigenvalues: Tensor
    weights: Tensor

    def mean(self, function: Callable[[Tensor], Tensor]) -> float:
        """Tr f(H) / W, the mean of ``function`` over the eigenvalues."""
        return float(self.weights @ function(self.eigenvalues))

    def at(self, points: Tensor, width: float) -> Tensor:
        """The density at ``points``, every eigenvalue spread to a normal one of standard deviation ``width``."""
        scaled = (points.double()[..., None] - self.eigenvalues) / width
        peaks = torch.exp(-scaled.square() / 2) / (width * math.sqrt(2 * math.pi))
        return peaks @ self.weights


def spectral_density(trial: Trial, *, probes: int = 1, steps: int = STEPS) -> SpectralDensity:
    """The spectral density of ∇²L, L the mean loss of the trial's subset.

    It takes ``probes`` times ``steps`` Hessian-vector products, and the memory of ``steps`` weight vectors in float64.
    With no more than ``steps`` parameters it is exact.

    Args:
        trial: as measures are given it.
        probes: random vectors, over which the rule is averaged.
        steps: nodes of the rule for each of them.

    Raises:
        UndefinedMeasureError: for networks without a right second derivative, and for sharded ones.
        FlatminimaError: for less than one probe or two steps.
    """
    require(probes >= 1 and steps >= 2, f"it takes a probe and two steps, got {probes} and {steps}")
    with hessian_of(trial, trial.generator()) as hessian:
        if len(hessian) <= steps:
            eigenvalues = torch.linalg.eigvalsh(hessian.dense().double())
            return SpectralDensity(eigenvalues, torch.full_like(eigenvalues, 1 / len(eigenvalues)))
        generator = trial.generator()
        size = len(hessian)
        starts = [torch.randn(size, generator=generator, dtype=torch.float64, device="cpu") for _ in range(probes)]
        rules = [_quadrature(*_tridiagonal(hessian, start, steps)) for start in starts]
    eigenvalues, order = torch.cat([nodes for nodes, _ in rules]).sort()
    return SpectralDensity(eigenvalues, torch.cat([weights for _, weights in rules])[order] / probes)


@catalogued(
    "negative share of the curvature", cost="costly", source="Ghorbani et al. 2019, by stochastic Lanczos quadrature"
)
def hessian_negative_energy(trial: Trial) -> float:
    """Σ |λ| over the negative eigenvalues of ∇²L as a share of Σ |λ| over all: 0 at a minimum of a smooth loss.

    By one probe of 30 steps; the standard error over trials includes what that adds.

    Raises:
        UndefinedMeasureError: for networks without a right second derivative, and for sharded ones.
    """
    density = spectral_density(trial)
    total = density.mean(torch.abs)
    return density.mean(lambda eigenvalues: (-eigenvalues).clamp_min(0)) / total if total > 0 else math.nan


def _tridiagonal(hessian: Hessian, start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of Lanczos' matrix; shorter where products stay within fewer dimensions."""
    basis = start.new_empty(steps, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    smallest = len(start) ** 0.5 * torch.finfo(hessian.dtype).eps
    for step in range(steps):
        found = basis[: step + 1]
        product = hessian.times(basis[step].to(hessian.dtype)).double()
        diagonal.append(float(product @ basis[step]))
        for _ in range(2):  # rounding would bring found directions, and with them eigenvalues, back; twice is enough
            product = product - found.T @ (found @ product)
        left = float(product.norm())
        if step + 1 == steps or left <= smallest * max(map(abs, (*diagonal, *beside))):
            break
        beside.append(left)
        basis[step + 1] = product / left
    return diagonal, beside


def _quadrature(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Nodes and weights."""
    whole = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    off = torch.tensor(beside, dtype=torch.float64, device="cpu")
    whole += torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(whole)
    return nodes, vectors[0].square()
