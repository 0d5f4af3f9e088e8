"""What steps with a penalty saw, and what it says of the regularizer's settings: warnings come from here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from flatminima.errors import IdlePenaltyWarning, NoisyPenaltyWarning, warn

IDLE = 1e-3
"""A penalty's gradient below this share of the main one does nothing."""

NOISY = 0.3
"""A penalty's gradient of which more than this is rounding is noise."""

_GRADIENT_ERROR = 5
"""The relative rounding error of a gradient, in ε: benchmarks/finite_differences.py."""

_RESIDUAL_ERROR = 0.5
"""The rounding error of a cross entropy's gradient at the logits, p − y, relative to 1, in ε."""

WINDOW = 20
"""Penalties to a look at them: medians, as a single odd step says nothing, and the device waits no more often."""


class Rounding(NamedTuple):
    """How coarsely the passes of a penalty round.

    Attributes:
        eps: ε of the coarsest type that they go through.
        residual_eps: ε of the type in which a cross entropy takes its logits; zero of other losses.
    """

    eps: float
    residual_eps: float

    def of_gradient(self, loss: Tensor) -> Tensor:
        """The relative error of a gradient, to an order of magnitude and at most 1.

        A cross entropy's gradient at the logits is a probability less a label. Of a sample that fits, both are nearly
        the same: the difference is about the loss, and its error that of numbers about 1.

        Args:
            loss: the mean loss, a scalar, taken for the cross entropy's own. One that is scaled, or less a baseline,
                counts as one that is as small; what is added to it hides how small it is.
        """
        residual = self.residual_eps / loss.abs().clamp_min(torch.finfo(loss.dtype).tiny)
        return (_GRADIENT_ERROR * self.eps + _RESIDUAL_ERROR * residual).clamp_max(1.0)


@dataclass(frozen=True)
class RegularizerStep:
    """What one step saw. Scalar tensors on the model's device, so that keeping them does not wait for the device.

    With micro-batches, all but ``grad_norm`` are averages over them; where a framework owns the main pass
    (:meth:`FisherTraceRegularizer.penalize`) they are those of the last one. With several processes, all but
    ``grad_norm`` are this process's.

    Attributes:
        trace: mean_i ‖g_i‖₂², the trace estimate that the penalty drives down (Sec. 6).
        penalty: R_α (Eq. 6), without β. Close to ``alpha * trace`` where the network is smooth.
        penalty_gradient_norm: ‖∇R_α‖₂, without β.
        main_gradient_norm: ‖mean_i g_i‖₂, the norm of the main gradient as the sub-batches see it.
        rounding_norm: the 2-norm of the rounding error in ∇R_α, to an order of magnitude: each gradient g is taken to
            be off by δ‖g‖, and so the mean of M differences by δ √(2 · trace / M). δ is
            5 ε, where ε is that of the coarsest type that the passes go through, a frozen base's too; and 0.5 ε / loss
            besides for a cross entropy, with the ε of its logits. Where another loss is small (squared errors near
            zero), this is too little. Zero for ``"hvp"``.
        grad_norm: global 2-norm of ``.grad`` after the step and before clipping; None where a framework owns the main
            pass.
    """

    trace: Tensor
    penalty: Tensor
    penalty_gradient_norm: Tensor
    main_gradient_norm: Tensor
    rounding_norm: Tensor
    grad_norm: Tensor | None = None

    @classmethod
    def mean(cls, micro_batches: Sequence[tuple[float, RegularizerStep]], grad_norm: Tensor) -> RegularizerStep:
        """The average over micro-batches, each with its weight; ``grad_norm`` is that of all."""
        total = sum(weight for weight, _ in micro_batches)
        names = [field.name for field in fields(cls) if field.name != "grad_norm"]
        means = {name: sum(weight / total * getattr(step, name) for weight, step in micro_batches) for name in names}
        return cls(**means, grad_norm=grad_norm)


class Shares(NamedTuple):
    """What a step's penalty is, beside the main gradient and beside its own rounding error."""

    penalty_to_gradient: float
    """β‖∇R_α‖ / ‖mean_i g_i‖; zero where there is no gradient."""
    rounding_share: float
    """The estimated part of ‖∇R_α‖ that is rounding error, at most 1."""


def shares_of(steps: Sequence[RegularizerStep], betas: Sequence[float]) -> list[Shares]:
    """Those of each step with its weight β. Waits for the device once."""
    norms = [(step.penalty_gradient_norm, step.main_gradient_norm, step.rounding_norm) for step in steps]
    found = torch.stack([torch.stack(own) for own in norms]).tolist()
    return [
        Shares(
            beta * penalty / main if main else 0.0,
            min(1.0, rounding / penalty) if penalty else float(rounding > 0),
        )
        for beta, (penalty, main, rounding) in zip(betas, found, strict=True)
    ]


class PenaltyWatch:
    """Looks, every :data:`WINDOW` penalties, whether these do something, and warns, once, where they do not.

    A penalty that has once done something may fade later, together with the gradients of a network that fits: this is
    what it is for, and no reason to warn. So only a run's first look says that a penalty is idle, and later ones say
    that it is noise only where it has an effect.
    """

    def __init__(self) -> None:
        self._steps: list[RegularizerStep] = []
        self._may_never_act = False
        self._has_warned = False

    def note(self, step: RegularizerStep, *, alpha: float, beta: float, every: int, first: bool) -> None:
        """A step with a penalty of the full weight ``every * beta``, and whether it is the run's first."""
        if self._has_warned:
            return
        self._may_never_act |= first
        self._steps.append(step)
        if len(self._steps) < WINDOW:
            return
        ratios, rounding = zip(*shares_of(self._steps, [every * beta] * WINDOW), strict=True)
        ratio, share = statistics.median(ratios), statistics.median(rounding)
        if share > NOISY and (self._may_never_act or ratio >= IDLE):
            self._warn(
                f"{100 * share:.0f} % of the penalty's gradient is rounding error (median over {WINDOW} penalties, "
                f"alpha={alpha:g}): the penalty is mostly noise. Choose estimator='hvp', which does not round so; or, "
                "where a cross entropy is small, give it float64 logits (loss(output.double(), targets)); or, where "
                "activations are smooth, raise alpha and lower beta by the same factor, as alpha * beta is the weight "
                "of the trace (with ReLU a larger alpha crosses more kinks)",
                NoisyPenaltyWarning,
            )
        elif self._may_never_act and ratio < IDLE:
            self._warn(
                f"the penalty's gradient is {ratio:.1g} of the main one (median over {WINDOW} penalties, "
                f"beta={beta:g}, alpha={alpha:g}): the penalty does nothing. Raise beta; flatminima.suggest says "
                "where to start",
                IdlePenaltyWarning,
            )
        self._steps, self._may_never_act = [], False

    def _warn(self, message: str, category: type[Warning]) -> None:
        self._has_warned = True
        warn(message, category)
