"""A per-sample loss and its gradient at the logits, formed in float64 and handed on in factored form.

At a good minimum p_y → 1, and p_y − 1 cancels in float32: a log-determinant built on it is wrong long before it is
−inf. So the gradient δ_i = ∂ℓ_i/∂logits_i is formed in float64, where δ_y = −Σ_{c≠y} p_c needs no subtraction, and
handed on as a unit direction and the logarithm of its norm. A row of J is linear in δ_i, so the direction alone is
back-propagated and the norm is put back at the end, in logarithms: nothing under- or overflows on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.network import back_like, in_float64

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, targets)`` → one value per sample, shape (N,). Sample i's value may depend on ``logits[i]`` alone."""

LOGIT_NORMALIZATION = 0.04
"""The authors' constant: logits are divided by 0.04 times their norm, so every sample's have norm 25."""

_CHUNK_ELEMENTS = 2**24
"""Logits taken to float64 at once (128 MiB): a language model's logits would not fit whole."""


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


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy per sample, of one label or of one label per position (tokens, pixels).

    A sample's loss is the sum, or the mean, over its positions that count. The paper's measures are defined by the
    plain loss of the label (Eq. 4), also for networks trained with label smoothing.

    Attributes:
        label_smoothing: ε, mass moved from the label to the uniform distribution, in [0, 1).
        weight: one factor per class for the loss of samples of that class.
        ignore_index: positions with this target do not count.
        next_token: position t is to predict target t + 1 (language models, whose labels are their inputs).
        positions: ``"mean"`` or ``"sum"`` over the positions that count.

    Example:
        >>> import torch
        >>> loss = CrossEntropy(next_token=True)
        >>> loss(torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))).shape
        torch.Size([2])
    """

    label_smoothing: float = 0.0
    weight: tuple[float, ...] | None = None
    ignore_index: int = -100
    next_token: bool = False
    positions: Literal["mean", "sum"] = "mean"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(N,) float64. Logits (N, K), (N, ..., K), or (N, K, ...) as PyTorch has them; targets the same without K."""
        return logit_gradient(self, logits, targets).loss

    def gradient(self, logits: Tensor, targets: Tensor) -> LogitGradient:
        """Losses and factored gradients at float64 logits."""
        class_last = _class_last(logits, targets)
        z = logits if class_last else logits.movedim(1, -1)
        if self.next_token:
            if z.dim() != 3:
                raise FlatminimaError(
                    f"next_token needs logits of shape (N, T, K), the model returned {tuple(z.shape)}"
                )
            z, targets = z[:, :-1], targets[:, 1:]
        n, classes = z.shape[0], z.shape[-1]
        flat, labels = z.reshape(-1, classes), targets.reshape(-1)
        counted = labels != self.ignore_index
        _check_classes(labels[counted] if targets.dim() > 1 else labels, classes)  # a sample cannot be ignored whole
        labels = labels.where(counted, 0)
        losses, direction, log_norm = self._of_positions(flat, labels)
        share = self._shares(counted.view(n, -1), labels.view(n, -1))
        losses = (share * losses.view(n, -1)).sum(1)
        direction, log_norm = _combine(direction.view(n, -1, classes), log_norm.view(n, -1) + share.log())
        direction = direction.reshape(z.shape)
        if self.next_token:
            direction = F.pad(direction, (0, 0, 0, 1))
        return LogitGradient(losses, direction if class_last else direction.movedim(-1, 1), log_norm)

    def _shares(self, counted: Tensor, labels: Tensor) -> Tensor:
        """(N, positions): the factor of every position's loss in its sample's."""
        share = counted.double()
        if self.positions == "mean":
            share = share / share.sum(1, keepdim=True).clamp_min(1)
        if self.weight is not None:
            share = share * torch.tensor(self.weight, dtype=torch.float64, device=labels.device)[labels]
        return share

    def _of_positions(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (M,), direction (M, K) and log-norm (M,) of single positions."""
        log_p = logits.log_softmax(1)
        log_p_y = log_p.gather(1, labels[:, None])[:, 0]
        others = log_p.scatter(1, labels[:, None], -torch.inf)
        largest = others.amax(1, keepdim=True)
        scaled = (others - largest).exp_()  # p_c / max_{c≠y} p_c: exact however small p_c is
        total = scaled.sum(1, keepdim=True)
        scaled.scatter_(1, labels[:, None], -total)
        losses = F.softplus((largest + total.log())[:, 0] - log_p_y)
        if self.label_smoothing:
            epsilon = self.label_smoothing
            losses = (1 - epsilon) * losses - epsilon * log_p.mean(1)
            delta = scaled * largest.exp()
            delta = (1 - epsilon) * delta + epsilon * (log_p.exp() - 1 / logits.shape[1])
            norm = delta.norm(dim=1, keepdim=True)
            return losses, delta / norm.where(norm > 0, 1), norm[:, 0].log()
        norm = scaled.norm(dim=1, keepdim=True)
        return losses, scaled / norm, (largest + norm.log())[:, 0]


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross entropy with logits per sample, the mean over its outputs; targets in [0, 1], as many as logits."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(N,) float64."""
        return logit_gradient(self, logits, targets).loss

    def gradient(self, logits: Tensor, targets: Tensor) -> LogitGradient:
        """Losses and factored gradients at float64 logits; at labels 0 and 1 without cancellation."""
        if targets.shape != logits.shape:
            raise FlatminimaError(
                f"binary cross entropy needs targets of the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        y, outputs = targets.double(), logits[0].numel()
        losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none").reshape(len(logits), -1).mean(1)
        certain = (y == 0) | (y == 1)
        log_delta = torch.where(certain, F.logsigmoid(logits * (1 - 2 * y)), (logits.sigmoid() - y).abs().log())
        sign = torch.where(certain, 1 - 2 * y, (logits.sigmoid() - y).sign())
        direction, log_norm = _combine(sign.reshape(len(y), -1, 1), log_delta.reshape(len(y), -1))
        return LogitGradient(losses, direction.view_as(logits), log_norm - torch.tensor(outputs).double().log())


Loss = Literal["cross_entropy"] | CrossEntropy | BinaryCrossEntropy | nn.Module | PerSampleLoss
"""``"cross_entropy"``; a loss of this module; ``torch.nn``'s CrossEntropyLoss, BCEWithLogitsLoss or MSELoss, read as
the per-sample loss it averages; or any per-sample loss."""


def logit_gradient(
    loss: Loss | FactoredLoss, logits: Tensor, targets: Tensor, *, logit_normalization: float | None = None
) -> LogitGradient:
    """Per-sample losses and their gradients at the logits.

    Args:
        loss: see :data:`Loss`.
        logits: (N, K) for a single label, (N, ...) otherwise.
        targets: (N,) class indices for a single label; whatever ``loss`` takes otherwise.
        logit_normalization: κ: the loss is taken at z / (κ ‖z‖₂) instead of the logits z, which removes how far they
            have grown, and with it the training loss, from what is compared (the authors' remedy, κ = 0.04, for their
            Table 2). The gradient is still the one at z.

    Raises:
        NonFiniteError: if a logit or a loss is NaN or infinite; names the samples.
        FlatminimaError: for targets or a loss of the wrong kind.
    """
    logits = logits.detach()
    refuse_non_finite("logits", logits)
    per_sample = per_sample_form(loss)
    direction, losses, log_norms = torch.empty_like(logits), [], []
    for rows in _chunks(logits):
        z = in_float64(logits[rows])
        y = targets[rows].to(z.device)
        if logit_normalization is not None:
            part = _at_normalized_logits(per_sample, z, y, logit_normalization)
        else:
            part = _gradient(per_sample, z, y)
        direction[rows] = back_like(part.direction, logits)
        losses.append(part.loss)
        log_norms.append(part.log_norm)
    joined = torch.cat(losses)
    refuse_non_finite("losses", joined)
    return LogitGradient(joined, direction, torch.cat(log_norms))


def per_sample_loss(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """The losses alone: (N,) float64. Takes and raises what :func:`logit_gradient` does."""
    return logit_gradient(loss, logits, targets).loss


def per_sample_form(loss: Loss | FactoredLoss) -> FactoredLoss | PerSampleLoss:
    """The per-sample loss that ``loss`` names, is, or averages.

    Raises:
        FlatminimaError: for an unknown name, a loss module that is not understood, or something that is no loss.
    """
    if loss == "cross_entropy":
        return CrossEntropy()
    if isinstance(loss, FactoredLoss):
        return loss
    if isinstance(loss, nn.CrossEntropyLoss):
        weight = None if loss.weight is None else tuple(loss.weight.tolist())
        if weight and loss.label_smoothing:
            raise FlatminimaError(
                "CrossEntropyLoss with both weight and label_smoothing weighs every class of the smoothed label, which "
                "has no per-sample form here: pass a callable loss(logits, targets) -> (N,) tensor"
            )
        return CrossEntropy(label_smoothing=loss.label_smoothing, weight=weight, ignore_index=loss.ignore_index)
    if isinstance(loss, nn.BCEWithLogitsLoss) and loss.weight is None and loss.pos_weight is None:
        return BinaryCrossEntropy()
    if isinstance(loss, nn.MSELoss):
        return _mean_squared_error
    if isinstance(loss, nn.Module) and getattr(loss, "reduction", "none") != "none":
        raise FlatminimaError(
            f"{type(loss).__name__} averages over the batch: build it with reduction='none', or pass a callable "
            "loss(logits, targets) -> (N,) tensor"
        )
    if callable(loss):
        return loss
    raise FlatminimaError(
        f"unknown loss {loss!r}: use 'cross_entropy' or a callable loss(logits, targets) -> (N,) tensor"
    )


def is_single_label(loss: Loss, logits: Tensor) -> bool:
    """Whether the argmax of the logits is a prediction of the target."""
    return isinstance(per_sample_form(loss), CrossEntropy) and logits.dim() == 2


def off_target_log_probabilities(logits: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities of every class but y, −inf at y: (N, K) float64; their exponentials sum to 1 − p_y exactly."""
    return logits.log_softmax(1).scatter(1, classes[:, None], -torch.inf)


def refuse_non_finite(what: str, values: Tensor) -> None:
    """Raise :class:`NonFiniteError` naming the samples (first dimension) that hold NaN or infinity."""
    if values.isfinite().all():
        return
    bad = (
        (~values.isfinite().flatten(1).all(1) if values.dim() > 1 else ~values.isfinite()).nonzero().flatten().tolist()
    )
    raise NonFiniteError(
        f"NaN or infinite {what} for {len(bad)} of {len(values)} samples (first: {bad[:5]}): "
        "check these samples and the weights"
    )


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(1, logits[0].numel()))
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def _gradient(loss: FactoredLoss | PerSampleLoss, logits: Tensor, targets: Tensor) -> LogitGradient:
    if isinstance(loss, FactoredLoss):
        return loss.gradient(logits, targets)
    return _by_autograd(loss, logits, targets)


def _by_autograd(loss: PerSampleLoss, logits: Tensor, targets: Tensor) -> LogitGradient:
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


def _at_normalized_logits(
    loss: FactoredLoss | PerSampleLoss, logits: Tensor, targets: Tensor, kappa: float
) -> LogitGradient:
    """∂ℓ(z/(κ‖z‖))/∂z = (δ − ẑ ẑᵀδ) / (κ‖z‖), δ the gradient at the normalized logits and ẑ = z/‖z‖."""
    shape = (-1,) + (1,) * (logits.dim() - 1)
    size = logits.flatten(1).norm(dim=1)
    if not (kappa > 0 and size.min() > 0):
        raise FlatminimaError(
            f"logit_normalization={kappa} needs a positive constant and logits that are not all zero: leave it out"
        )
    unit = logits / size.view(shape)
    inner = _gradient(loss, unit / kappa, targets)
    along = (unit * inner.direction).flatten(1).sum(1).view(shape)
    delta = inner.direction - unit * along
    norm = delta.flatten(1).norm(dim=1)
    direction = delta / norm.where(norm > 0, 1).view(shape)
    return LogitGradient(inner.loss, direction, inner.log_norm + norm.log() - (kappa * size).log())


def _combine(directions: Tensor, log_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Parts (N, P, K) of norms exp(log_norms) (N, P) as one unit direction per sample, and the norm's logarithm."""
    largest = log_norms.amax(1, keepdim=True)
    reference = largest.where(largest > -torch.inf, 0)
    delta = directions * (log_norms - reference).exp()[:, :, None]
    norm = delta.flatten(1).norm(dim=1)
    return delta / norm.where(norm > 0, 1)[:, None, None], norm.log() + reference[:, 0]


def _mean_squared_error(prediction: Tensor, targets: Tensor) -> Tensor:
    if prediction.shape != targets.shape:
        raise FlatminimaError(
            f"mean squared error needs targets of the output's shape {tuple(prediction.shape)}, "
            f"got {tuple(targets.shape)}"
        )
    return (prediction - targets).square().flatten(1).mean(1)


def _class_last(logits: Tensor, targets: Tensor) -> bool:
    """Whether the classes are the logits' last dimension; (N, K, ...) as PyTorch has it otherwise."""
    if targets.is_floating_point() or targets.dtype == torch.bool or logits.dim() < 2:
        raise FlatminimaError(
            f"cross entropy needs logits of shape (N, K) and integer class indices, got {tuple(logits.shape)} and "
            f"{targets.dtype}: pass class indices, or a per-sample loss callable"
        )
    if logits.shape[:-1] == targets.shape:
        return True
    if logits.shape[:1] + logits.shape[2:] == targets.shape:
        return False
    raise FlatminimaError(
        f"targets of shape {tuple(targets.shape)} are no class indices for logits of shape {tuple(logits.shape)}: "
        "pass one per sample, or one per position"
    )


def _check_classes(labels: Tensor, classes: int) -> None:
    if classes < 2:
        raise FlatminimaError(
            f"cross entropy needs K ≥ 2 classes, the model has {classes}: pass a per-sample loss callable"
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise FlatminimaError(
            f"targets run from {int(labels.min())} to {int(labels.max())} but the model has {classes} outputs: "
            "use a model with the data's number of classes"
        )
