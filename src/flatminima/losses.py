"""Ground: a per-sample loss and its gradient at the logits, in float64 and in factored form.

At a good minimum p_y → 1, and p_y − 1 cancels in float32: a log-determinant built on it is wrong long before it is
−inf. So the gradient δ_i = ∂ℓ_i/∂logits_i is formed in float64, where δ_y = −Σ_{c≠y} p_c needs no subtraction, and
handed on as a unit direction and the logarithm of its norm. A row of J is linear in δ_i, so the direction alone is
back-propagated and the norm is put back at the end, in logarithms: nothing under- or overflows on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, NonFiniteError

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, targets)`` → one value per sample, shape (N,). Sample i's value may depend on ``logits[i]`` alone."""

Loss = Literal["cross_entropy"] | PerSampleLoss


@dataclass(frozen=True)
class LogitGradient:
    """Per-sample losses and δ = ∂ℓ/∂logits, factored: δ_i = exp(log_norm_i) · direction_i.

    Attributes:
        loss: (N,) float64, in nats for the cross entropy.
        direction: the logits' shape, float64; unit Euclidean norm per sample, all zero where δ_i is zero.
        log_norm: (N,) float64, ln ‖δ_i‖₂; −inf where δ_i is zero.
    """

    loss: Tensor
    direction: Tensor
    log_norm: Tensor


LOGIT_NORMALIZATION = 0.04
"""The authors' constant: logits are divided by 0.04 times their norm, so every sample's have norm 25."""


def logit_gradient(
    loss: Loss, logits: Tensor, targets: Tensor, *, logit_normalization: float | None = None
) -> LogitGradient:
    """Per-sample losses and their gradients at the logits.

    Args:
        loss: ``"cross_entropy"`` (targets: int64 class indices), or a per-sample loss.
        logits: (N, K) for the cross entropy, (N, ...) otherwise.
        targets: (N,) class indices for the cross entropy; whatever ``loss`` takes otherwise.
        logit_normalization: κ: the loss is taken at z / (κ ‖z‖₂) instead of the logits z, which removes how far they
            have grown, and with it the training loss, from what is compared (the authors' remedy, κ = 0.04, for their
            Table 2). The gradient is still the one at z.

    Raises:
        NonFiniteError: if a logit or a loss is NaN or infinite; names the samples.
        FlatminimaError: for targets or a loss of the wrong kind.
    """
    logits = logits.detach().double()
    refuse_non_finite("logits", logits)
    if logit_normalization is not None:
        return _at_normalized_logits(loss, logits, targets, logit_normalization)
    if loss == "cross_entropy":
        return _cross_entropy(logits, targets)
    if callable(loss):
        return _any_loss(loss, logits, targets)
    raise FlatminimaError(
        f"unknown loss {loss!r}: use 'cross_entropy' or a callable loss(logits, targets) -> (N,) tensor"
    )


def _at_normalized_logits(loss: Loss, logits: Tensor, targets: Tensor, kappa: float) -> LogitGradient:
    """∂ℓ(z/(κ‖z‖))/∂z = (δ − ẑ ẑᵀδ) / (κ‖z‖), δ the gradient at the normalized logits and ẑ = z/‖z‖."""
    shape = (-1,) + (1,) * (logits.dim() - 1)
    size = logits.flatten(1).norm(dim=1)
    if not (kappa > 0 and size.min() > 0):
        raise FlatminimaError(
            f"logit_normalization={kappa} needs a positive constant and logits that are not all zero: leave it out"
        )
    unit = logits / size.view(shape)
    inner = logit_gradient(loss, unit / kappa, targets)
    along = (unit * inner.direction).flatten(1).sum(1).view(shape)
    delta = inner.direction - unit * along
    norm = delta.flatten(1).norm(dim=1)
    direction = delta / norm.where(norm > 0, 1).view(shape)
    return LogitGradient(inner.loss, direction, inner.log_norm + norm.log() - (kappa * size).log())


def per_sample_loss(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """The losses alone: (N,) float64. Takes and raises what :func:`logit_gradient` does."""
    return logit_gradient(loss, logits, targets).loss


def off_target_log_probabilities(logits: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities of every class but y, −inf at y: (N, K) float64; their exponentials sum to 1 − p_y exactly."""
    return logits.log_softmax(1).scatter(1, classes[:, None], -torch.inf)


def refuse_non_finite(what: str, values: Tensor) -> None:
    """Raise :class:`NonFiniteError` naming the samples (first dimension) that hold NaN or infinity."""
    bad = (
        (~values.isfinite().flatten(1).all(1) if values.dim() > 1 else ~values.isfinite()).nonzero().flatten().tolist()
    )
    if bad:
        raise NonFiniteError(
            f"NaN or infinite {what} for {len(bad)} of {len(values)} samples (first: {bad[:5]}): "
            "check these samples and the weights"
        )


def _cross_entropy(logits: Tensor, targets: Tensor) -> LogitGradient:
    _check_classes(logits, targets)
    others = off_target_log_probabilities(logits, targets)
    largest = others.amax(1, keepdim=True)
    scaled = (others - largest).exp()  # p_c / max_{c≠y} p_c: exact however small p_c is
    scaled.scatter_(1, targets[:, None], -scaled.sum(1, keepdim=True))
    norm = scaled.norm(dim=1, keepdim=True)
    losses = torch.nn.functional.softplus(others.logsumexp(1) - logits.log_softmax(1).gather(1, targets[:, None])[:, 0])
    return LogitGradient(losses, scaled / norm, (largest + norm.log())[:, 0])


def _check_classes(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise FlatminimaError(
            f"cross entropy needs logits of shape (N, K) with K ≥ 2, the model returned {tuple(logits.shape)}: "
            "pass a per-sample loss callable for other outputs"
        )
    if targets.shape != logits.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise FlatminimaError(
            f"cross entropy needs {len(logits)} integer class indices, got targets of shape {tuple(targets.shape)} and "
            f"{targets.dtype}: pass class indices, or a per-sample loss callable"
        )
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= logits.shape[1]:
        raise FlatminimaError(
            f"targets run from {lowest} to {highest} but the model has {logits.shape[1]} outputs: "
            "use a model with the data's number of classes"
        )


def _any_loss(loss: PerSampleLoss, logits: Tensor, targets: Tensor) -> LogitGradient:
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        losses = loss(leaf, targets)
        if losses.shape != logits.shape[:1]:
            raise FlatminimaError(
                f"the loss returned shape {tuple(losses.shape)} for {len(logits)} samples: "
                "return one value per sample (reduction='none')"
            )
        (delta,) = torch.autograd.grad(losses.sum(), leaf)
    refuse_non_finite("losses", losses.detach())
    refuse_non_finite("loss gradients", delta)
    norm = delta.flatten(1).norm(dim=1)
    shape = (-1,) + (1,) * (delta.dim() - 1)
    return LogitGradient(losses.detach().double(), delta / norm.where(norm > 0, 1).view(shape), norm.log())
