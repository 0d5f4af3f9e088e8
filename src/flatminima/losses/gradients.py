"""A per-sample loss and its gradient at the logits, formed in float64 and handed on in factored form.

At a good minimum p_y → 1, and p_y − 1 cancels in float32: a log-determinant built on it is wrong long before it is
−inf. So the gradient δ_i = ∂ℓ_i/∂logits_i is formed in float64, where δ_y = −Σ_{c≠y} p_c needs no subtraction, and
handed on as a unit direction and the logarithm of its norm. A row of J is linear in δ_i, so the direction alone is
back-propagated and the norm is put back at the end, in logarithms: nothing under- or overflows on the way.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatminima.errors import FlatminimaError, NonFiniteError, WrongGradientError, first_line, require
from flatminima.network import back_like, in_float64

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, targets)`` → one value per sample, shape (N,). Sample i's value may depend on ``logits[i]`` alone."""

CHUNK_ELEMENTS = 2**20
"""Logits taken to float64 at once (8 MiB, some ten times over): a language model's logits would not fit whole."""

_OF_TYPES = re.compile(r"\bdtypes?\b|scalar type")
"""In PyTorch's errors, where tensors of two types meet."""

_ALONE_TOLERANCE = 1e-4
"""How far a sample's loss may be from its loss alone, relative to the largest loss: a callable may work in float32."""


@dataclass(frozen=True)
class LogitGradient:
    """Per-sample losses and δ = ∂ℓ/∂logits, factored: δ_i = exp(log_norm_i) · direction_i.

    Attributes:
        loss: (N,) float64, in nats for cross entropies.
        direction: the logits' shape, type and device; unit Euclidean norm per sample, all zero where δ_i is zero.
        log_norm: (N,) float64, ln ‖δ_i‖₂; −inf where δ_i is zero.
    """

    loss: Tensor
    direction: Tensor
    log_norm: Tensor


@runtime_checkable
class FactoredLoss(Protocol):
    """A loss with a gradient at float64 logits that keeps its digits however small it is."""

    def gradient(self, logits: Tensor, targets: Tensor) -> LogitGradient:
        """Losses and factored gradients at float64 logits."""
        ...


def gradient_of(
    form: FactoredLoss | PerSampleLoss, logits: Tensor, targets: Tensor, logit_normalization: float | None = None
) -> LogitGradient:
    """:func:`flatminima.losses.logit_gradient` of a loss whose per-sample form is known."""
    logits = logits.detach()
    refuse_non_finite("logits", logits)
    direction = torch.empty_like(logits)
    # All at once, as small tensors that outlive large ones would keep the allocator from giving these back.
    losses, log_norms = in_float64(logits.new_empty(2, len(logits)))
    for rows in _chunks(logits):
        z = in_float64(logits[rows])
        y = targets[rows].to(z.device)
        y = y.clone() if y.is_inference() else y  # autograd keeps none that was made in inference mode
        if logit_normalization is not None:
            part = _at_normalized_logits(form, z, y, logit_normalization)
        else:
            part = gradient_at(form, z, y)
        direction[rows] = back_like(part.direction, logits)
        losses[rows], log_norms[rows] = part.loss, part.log_norm
    refuse_non_finite("losses", losses)
    return LogitGradient(losses, direction, log_norms)


def gradient_at(loss: FactoredLoss | PerSampleLoss, logits: Tensor, targets: Tensor) -> LogitGradient:
    """Losses and factored gradients at float64 logits, all at once."""
    if isinstance(loss, FactoredLoss):
        return loss.gradient(logits, targets)
    return _by_autograd(loss, logits, targets)


def differentiable_losses(form: FactoredLoss | PerSampleLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) float64: the losses at float64 logits, on whose graph they stay."""
    return form.gradient(logits, targets).loss if isinstance(form, FactoredLoss) else _values(form, logits, targets)


def _by_autograd(loss: PerSampleLoss, logits: Tensor, targets: Tensor) -> LogitGradient:
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        losses = _values(loss, leaf, targets)
        require(
            losses.requires_grad,
            "the loss does not depend on the logits for autograd: compute it of the logits given, without detach, "
            "no_grad or numpy",
        )
        (delta,) = torch.autograd.grad(losses.sum(), leaf)
    losses, logits = losses.detach(), logits.detach()
    refuse_non_finite("losses", losses)
    refuse_non_finite("loss gradients", delta)
    _refuse_interacting(loss, logits, targets, losses)
    norm = delta.reshape(len(delta), -1).norm(dim=1)
    shape = (-1,) + (1,) * (delta.dim() - 1)
    return LogitGradient(losses.double(), delta / norm.where(norm > 0, 1).view(shape), norm.log())


def _values(loss: PerSampleLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """(N,): what the callable returns, for a single sample also as a scalar."""
    losses: Tensor = _called(loss, logits, targets)
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if len(logits) == 1 and shape == ():
        return losses.reshape(1)
    require(
        shape == (len(logits),),
        f"the loss returned {'shape ' if isinstance(shape, tuple) else ''}{shape} for {len(logits)} samples: "
        "return one value per sample (reduction='none')",
    )
    return losses


def _called(loss: PerSampleLoss, logits: Tensor, targets: Tensor) -> Any:
    """What the callable returns, with what it holds as that is; with that and the targets in float64 if it must be."""
    try:
        return loss(logits, targets)
    except RuntimeError as error:
        if not _OF_TYPES.search(str(error)):
            raise
        try:
            return _called_in_double(loss, logits, targets)
        except RuntimeError:
            raise FlatminimaError(
                f"the loss cannot take logits in float64, in which its gradients are formed: {first_line(error)}; "
                "convert in it what it holds, such as class weights: weight.to(logits)"
            ) from error


def _called_in_double(loss: PerSampleLoss, logits: Tensor, targets: Tensor) -> Any:
    """As the logits are: the targets, and a module's and a ``functools.partial``'s own tensors."""
    targets = _in_double(targets)
    if isinstance(loss, nn.Module) and not isinstance(loss, torch.jit.ScriptModule):
        state = itertools.chain(loss.named_parameters(), loss.named_buffers())
        return functional_call(loss, {name: _in_double(tensor) for name, tensor in state}, (logits, targets))
    if isinstance(loss, functools.partial):
        keywords = {name: _in_double(value) for name, value in loss.keywords.items()}
        return loss.func(*map(_in_double, loss.args), logits, targets, **keywords)
    return loss(logits, targets)


def _in_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _refuse_interacting(loss: PerSampleLoss, logits: Tensor, targets: Tensor, losses: Tensor) -> None:
    """Compare the first loss and the largest with those of the two samples alone."""
    if len(logits) < 2:
        return
    largest = losses.abs().argmax().item()
    for sample in {0, int(largest)}:
        one = slice(sample, sample + 1)
        with torch.no_grad():
            alone = _values(loss, logits[one], targets[one])[0].item()
        among = losses[sample].item()
        if not abs(alone - among) <= _ALONE_TOLERANCE * losses.abs().max().item():
            raise WrongGradientError(
                f"the loss gives a sample another value in another batch ({alone:.6g} alone, {among:.6g} among "
                f"{len(logits)}): return a loss that depends on the sample alone, divided by nothing of the batch"
            )


def _at_normalized_logits(
    loss: FactoredLoss | PerSampleLoss, logits: Tensor, targets: Tensor, kappa: float
) -> LogitGradient:
    """∂ℓ(z/(κ‖z‖))/∂z = (δ − ẑ ẑᵀδ) / (κ‖z‖), δ the gradient at the normalized logits and ẑ = z/‖z‖."""
    shape = (-1,) + (1,) * (logits.dim() - 1)
    size = logits.reshape(len(logits), -1).norm(dim=1)
    if not (kappa > 0 and size.min() > 0):
        raise FlatminimaError(
            f"logit_normalization={kappa} needs a positive constant and logits that are not all zero: leave it out"
        )
    unit = logits / size.view(shape)
    inner = gradient_at(loss, unit / kappa, targets)
    along = (unit * inner.direction).reshape(len(unit), -1).sum(1).view(shape)
    delta = inner.direction - unit * along
    norm = delta.reshape(len(delta), -1).norm(dim=1)
    direction = delta / norm.where(norm > 0, 1).view(shape)
    return LogitGradient(inner.loss, direction, inner.log_norm + norm.log() - (kappa * size).log())


def refuse_non_finite(what: str, values: Tensor, *, first: int = 0, why: str = "") -> None:
    """Raise :class:`NonFiniteError` naming the samples that hold NaN or infinity.

    Args:
        what: is not finite.
        values: a row per sample.
        first: the number of the first sample.
        why: what is known of the reason, put behind the message.
    """
    if values.isfinite().all():
        return
    bad = [first + i for i in (~values.isfinite().reshape(len(values), -1).all(1)).nonzero().flatten().tolist()]
    raise NonFiniteError(
        f"NaN or infinite {what} for {len(bad)} of {len(values)} samples (first: {bad[:5]}): "
        f"check these samples and the weights{why}"
    )


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, logits[0].numel()))
    for start in range(0, len(logits), size):
        yield slice(start, start + size)
