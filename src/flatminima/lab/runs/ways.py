"""The ways of training beside plain descent: what sets the gradients of a run, by its spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor, nn

from flatminima.lab.runs.fisher_penalty import FisherPenaltyGradient
from flatminima.lab.runs.sam import SharpnessAwareGradient
from flatminima.lab.runs.spec import (
    FisherPenaltySpec,
    GradientNormSpec,
    Regularizer,
    RegularizerSpec,
    RunSpec,
    SharpnessAwareSpec,
    UnitResidualSpec,
)
from flatminima.lab.runs.unit_residuals import UnitResidualGradient
from flatminima.network import Inputs
from flatminima.regularizer import FisherTraceRegularizer, LossFunction

_NAMES = {
    RegularizerSpec: "the regularizer",
    SharpnessAwareSpec: "sharpness-aware minimization",
    GradientNormSpec: "the gradient-norm penalty",
    FisherPenaltySpec: "the Fisher penalty",
    UnitResidualSpec: "the regularizer at unit residuals",
}


class Way(Protocol):
    """What takes the place of ``loss.backward()``."""

    def backward(self, loss_fn: LossFunction, inputs: Inputs, targets: Any) -> Tensor:
        """Set ``.grad``; return the loss at the weights, detached."""
        ...

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs beside the weights, the optimizer and torch's generator."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict`."""
        ...


def name_of(regularizer: Regularizer) -> str:
    """What a way of training is called in messages."""
    return _NAMES[type(regularizer)]


def way_of(network: nn.Module, spec: RunSpec, processes: int) -> Way | None:
    """What sets the gradients, if training is not plain; each process takes its part of the sub-batches."""
    regularizer = spec.regularizer
    if regularizer is None:
        return None
    options = asdict(regularizer)
    del options["start_epoch"]
    if isinstance(regularizer, SharpnessAwareSpec):
        return SharpnessAwareGradient(network, **options)
    if isinstance(regularizer, GradientNormSpec):
        share = regularizer.weight / regularizer.radius
        return SharpnessAwareGradient(
            network, rho=regularizer.radius, share=share, max_grad_norm=regularizer.max_grad_norm
        )
    if isinstance(regularizer, FisherPenaltySpec):
        return FisherPenaltyGradient(network, **options)
    if isinstance(regularizer, UnitResidualSpec):
        return UnitResidualGradient(network, **options, label_smoothing=spec.label_smoothing)
    options["num_sub_batches"] //= processes
    return FisherTraceRegularizer(network, **options)
