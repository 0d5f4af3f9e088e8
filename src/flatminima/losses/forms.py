"""Which per-sample loss is meant by what a user passes as a loss: a name, a loss of ``torch.nn``, any callable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from flatminima.errors import FlatminimaError, require
from flatminima.losses.gradients import (
    FactoredLoss,
    LogitGradient,
    PerSampleLoss,
    differentiable_losses,
    gradient_at,
    gradient_of,
)
from flatminima.losses.known import BinaryCrossEntropy, CrossEntropy, SquaredError
from flatminima.network import float64_device, in_float64

LOGIT_NORMALIZATION = 0.04
"""The authors' constant: logits are divided by 0.04 times their norm, so every sample's have norm 25."""

Loss = Literal["cross_entropy"] | CrossEntropy | BinaryCrossEntropy | nn.Module | PerSampleLoss
"""``"cross_entropy"``; a loss of this module; ``torch.nn``'s CrossEntropyLoss, BCEWithLogitsLoss or MSELoss, read as
the per-sample loss that it averages (over outputs and positions too) or sums; or any per-sample loss. A subclass is
what its own ``forward`` or ``__call__`` says."""


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
    return gradient_of(per_sample_form(loss), logits, targets, logit_normalization)


def per_sample_loss(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """The losses alone: (N,) float64. Takes and raises what :func:`logit_gradient` does."""
    return logit_gradient(loss, logits, targets).loss


def mean_loss(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the samples, float64, to be differentiated, also twice; small ones keep their digits.

    Takes and raises what :func:`logit_gradient` does.
    """
    form = single_output(per_sample_form(loss))
    return differentiable_losses(form, in_float64(logits), targets.to(float64_device(logits.device))).mean()


def per_sample_form(loss: Loss | FactoredLoss) -> FactoredLoss | PerSampleLoss:
    """The per-sample loss that ``loss`` names, is, or averages.

    Raises:
        FlatminimaError: for an unknown name, a loss module that is not understood, or something that is no loss.
    """
    if isinstance(loss, str) and loss == "cross_entropy":
        return CrossEntropy()
    if isinstance(loss, type):
        raise FlatminimaError(f"loss={loss.__name__} is a class: pass an instance, {loss.__name__}()")
    if isinstance(loss, nn.Module):
        return _form_of_module(loss)
    if isinstance(loss, FactoredLoss) and _own_gradient(type(loss)):
        return loss
    if callable(loss):
        return loss.__call__ if isinstance(loss, FactoredLoss) else loss
    what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise FlatminimaError(
        f"unknown loss {what}: use 'cross_entropy' or a callable loss(logits, targets) -> (N,) tensor"
    )


def _form_of_module(loss: nn.Module) -> FactoredLoss | PerSampleLoss:
    """The per-sample form of a ``torch.nn`` loss, by its exact type; a module of any other is a callable."""
    kind, reduction = type(loss), getattr(loss, "reduction", "none")
    over: Literal["mean", "sum"] = "sum" if reduction == "sum" else "mean"
    form: FactoredLoss | PerSampleLoss | None = None
    if kind is nn.CrossEntropyLoss and isinstance(loss, nn.CrossEntropyLoss):  # the second for types' sake
        form = _cross_entropy_of(loss, over)
    elif kind is nn.BCEWithLogitsLoss and loss.weight is None and loss.pos_weight is None:
        form = BinaryCrossEntropy(outputs=over)
    elif kind is nn.MSELoss:
        form = SquaredError(over)
    if form is not None:
        return _OneOutput(form, kind.__name__) if reduction == "none" else form
    require(
        reduction == "none" or kind.__module__ != nn.MSELoss.__module__,
        f"{kind.__name__} {'sums' if reduction == 'sum' else 'averages'} over the batch: build it with "
        "reduction='none', or pass a callable loss(logits, targets) -> (N,) tensor",
    )
    return loss


def _cross_entropy_of(loss: nn.CrossEntropyLoss, positions: Literal["mean", "sum"]) -> CrossEntropy:
    weight = None if loss.weight is None else tuple(loss.weight.tolist())
    require(
        not (weight and loss.label_smoothing),
        "CrossEntropyLoss with both weight and label_smoothing weighs every class of the smoothed label, which "
        "has no per-sample form here: pass a callable loss(logits, targets) -> (N,) tensor",
    )
    return CrossEntropy(loss.label_smoothing, weight, loss.ignore_index, positions=positions, class_dimension=1)


def _own_gradient(kind: type) -> bool:
    """Whether ``gradient`` is that of what a class computes: not inherited by one with a ``__call__`` of its own."""
    ancestors = kind.__mro__
    defined = [next((a for a in ancestors if name in vars(a)), ancestors[-1]) for name in ("gradient", "__call__")]
    return ancestors.index(defined[0]) <= ancestors.index(defined[1])


def is_single_label(loss: Loss, logits: Tensor) -> bool:
    """Whether the argmax of the logits is a prediction of the target."""
    return label_entropy(loss) is not None and logits.dim() == 2


def label_entropy(loss: Loss) -> CrossEntropy | None:
    """The cross entropy that a loss is, if it is one."""
    form = single_output(per_sample_form(loss))
    return form if isinstance(form, CrossEntropy) else None


def single_output(form: FactoredLoss | PerSampleLoss) -> FactoredLoss | PerSampleLoss:
    """Of a loss with reduction="none" that of samples with one value each; any other as it is."""
    return form.form if isinstance(form, _OneOutput) else form


@dataclass(frozen=True)
class _OneOutput:
    """A ``torch.nn`` loss with reduction="none", which says nothing of how several values of a sample become one.

    Attributes:
        form: the loss of a sample with one.
        name: the module's type.
    """

    form: FactoredLoss | PerSampleLoss
    name: str

    def gradient(self, logits: Tensor, targets: Tensor) -> LogitGradient:
        """As of the form, where every sample has one value."""
        gradient = gradient_at(self.form, logits, targets)  # which refuses unsuitable targets
        values = targets.numel()
        require(
            values <= len(targets),
            f"{self.name} with reduction='none' returns {values // max(len(targets), 1)} values per sample: say by "
            "reduction='mean' or 'sum' what becomes of them",
        )
        return gradient
