"""Losses that are known: cross entropies, whose gradients keep their digits, and the squared error, all per sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.errors import FlatminimaError, require, require_flag, require_integer, require_number
from flatminima.losses.gradients import LogitGradient, gradient_of

PIECE_ELEMENTS = 2**20
"""Logits whose gradients are formed at once (8 MiB, some ten times over), where a sample has many positions."""

_BEYOND = 1e-6
"""How far mixed labels in float32 may be past 0 or 1, by rounding."""


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
        class_dimension: -1 (last) or 1 (second, as PyTorch has it): where the classes are if the shapes fit both.

    Raises:
        FlatminimaError: for a value outside its range.

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
    class_dimension: Literal[-1, 1] = -1

    def __post_init__(self) -> None:
        require_number("label_smoothing", self.label_smoothing)
        require_integer("ignore_index", self.ignore_index)
        require_flag("next_token", self.next_token)
        require(0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        _require_mean_or_sum("positions", self.positions)
        require(self.class_dimension in (-1, 1), f"class_dimension must be -1 or 1, got {self.class_dimension!r}")
        if self.weight is not None:
            require(
                isinstance(self.weight, (Sequence, Tensor)) and not isinstance(self.weight, str),
                f"weight must be a factor for every class, got {self.weight!r}",
            )
            object.__setattr__(self, "weight", tuple(float(factor) for factor in self.weight))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(N,) float64. Logits (N, K), (N, ..., K), or (N, K, ...) as PyTorch has them; targets the same without K."""
        return gradient_of(self, logits, targets).loss

    def gradient(self, logits: Tensor, targets: Tensor) -> LogitGradient:
        """Losses and factored gradients at float64 logits."""
        class_last = self._class_last(logits, targets)
        z = logits if class_last else logits.movedim(1, -1)
        require(
            not self.next_token or (z.dim() == 3 and z.shape[1] > 1),
            f"next_token needs logits of shape (N, T ≥ 2, K), the model returned {tuple(z.shape)}",
        )
        n, classes = z.shape[0], z.shape[-1]
        require(
            self.weight is None or len(self.weight) == classes,
            f"weight has {len(self.weight or ())} factors, but the model has {classes} classes: give one per class",
        )
        z = z.reshape(n, -1, classes)
        used = z.shape[1] - self.next_token  # the last token has no next one
        labels = (targets[:, 1:] if self.next_token else targets).reshape(n, -1).long()
        counted = labels != self.ignore_index
        _check_classes(labels[counted] if targets.dim() > 1 else labels, classes)  # a sample cannot be ignored whole
        labels = labels.where(counted, 0)
        pieces, log_norm = [], logits.new_empty(n, used)
        direction = torch.zeros_like(z, memory_format=torch.contiguous_format)
        for part in _pieces(used, n * classes):
            losses, *of_part = self._of_positions(z[:, part].reshape(-1, classes), labels[:, part].reshape(-1))
            pieces.append(losses.view(n, -1))  # which may be differentiated, the gradients not
            direction[:, part], log_norm[:, part] = (
                values.detach().view(n, -1, *values.shape[1:]) for values in of_part
            )
        share = self._shares(counted, labels)
        losses = (share * torch.cat(pieces, 1)).sum(1)
        log_norm = _combine_(direction[:, :used], log_norm + share.log())
        direction = direction.reshape(logits.shape if class_last else logits.movedim(1, -1).shape)
        return LogitGradient(losses, direction if class_last else direction.movedim(-1, 1), log_norm)

    def _class_last(self, logits: Tensor, targets: Tensor) -> bool:
        """Whether the classes are the logits' last dimension; (N, K, ...) as PyTorch has it otherwise."""
        if targets.is_floating_point() or targets.dtype == torch.bool or logits.dim() < 2:
            raise FlatminimaError(
                f"cross entropy needs logits of shape (N, K) and integer class indices, got {tuple(logits.shape)} and "
                f"{targets.dtype}: pass class indices, or a per-sample loss callable"
            )
        last = logits.shape[:-1] == targets.shape
        second = logits.shape[:1] + logits.shape[2:] == targets.shape
        require(
            last or second,
            f"targets of shape {tuple(targets.shape)} are no class indices for logits of shape {tuple(logits.shape)}: "
            "pass one per sample, or one per position",
        )
        return last if last != second else self.class_dimension == -1

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
        scaled = scaled.scatter(1, labels[:, None], -total)  # not in place: `losses` may be differentiated
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
    """Binary cross entropy with logits per sample; targets in [0, 1], as many as logits; others are refused.

    Attributes:
        outputs: ``"mean"`` or ``"sum"`` over a sample's outputs.

    Raises:
        FlatminimaError: for another value.
    """

    outputs: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        _require_mean_or_sum("outputs", self.outputs)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(N,) float64."""
        return gradient_of(self, logits, targets).loss

    def gradient(self, logits: Tensor, targets: Tensor) -> LogitGradient:
        """Losses and factored gradients at float64 logits; at labels 0 and 1 without cancellation."""
        if targets.shape != logits.shape:
            raise FlatminimaError(
                f"binary cross entropy needs targets of the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        low, high = (value.item() for value in targets.double().aminmax())
        require(
            low >= -_BEYOND and high <= 1 + _BEYOND,
            f"binary cross entropy needs targets in [0, 1], got values from {low:g} to {high:g}: labels are 0 and 1",
        )
        y, share = targets.double(), 1.0 if self.outputs == "sum" else 1 / logits[0].numel()
        each = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        losses = share * each.reshape(len(logits), -1).sum(1)
        certain = (y == 0) | (y == 1)
        log_delta = torch.where(certain, F.logsigmoid(logits * (1 - 2 * y)), (logits.sigmoid() - y).abs().log())
        sign = torch.where(certain, 1 - 2 * y, (logits.sigmoid() - y).sign())
        direction = sign.detach().reshape(len(y), -1, 1)
        log_norm = _combine_(direction, log_delta.detach().reshape(len(y), -1))
        return LogitGradient(losses, direction.view_as(logits), log_norm + math.log(share))


@dataclass(frozen=True)
class SquaredError:
    """Squared error per sample, the mean or the sum over its outputs."""

    outputs: Literal["mean", "sum"]

    def __call__(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """(N,)."""
        require(
            prediction.shape == targets.shape,
            f"mean squared error needs targets of the output's shape {tuple(prediction.shape)}, "
            f"got {tuple(targets.shape)}",
        )
        squares = (prediction - targets).square().reshape(len(prediction), -1)
        return squares.mean(1) if self.outputs == "mean" else squares.sum(1)


def off_target_log_probabilities(logits: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities of every class but y, −inf at y: (N, K) float64; their exponentials sum to 1 − p_y exactly."""
    return logits.log_softmax(1).scatter(1, classes[:, None], -torch.inf)


def _combine_(directions: Tensor, log_norms: Tensor) -> Tensor:
    """Make parts (N, P, K) of norms exp(log_norms) (N, P) one unit direction per sample; the logarithm of its norm."""
    largest = log_norms.amax(1, keepdim=True)
    reference = largest.where(largest > -torch.inf, 0)
    delta = directions.mul_((log_norms - reference).exp()[:, :, None])  # in place: the largest tensor that there is
    norm: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2))
    delta.div_(norm.where(norm > 0, 1)[:, None, None])
    return norm.log() + reference[:, 0]


def _pieces(positions: int, size: int) -> Iterator[slice]:
    """Ranges of positions of so many entries each, of which some ten copies are made at once."""
    step = max(1, PIECE_ELEMENTS // size)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def _require_mean_or_sum(name: str, value: str) -> None:
    require(value in ("mean", "sum"), f"unknown {name}={value!r}: use 'mean' or 'sum'")


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
