"""The mean loss and the accuracy over a data set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from flatminima.errors import FlatminimaError
from flatminima.losses import Loss, is_single_label, per_sample_loss
from flatminima.network import Samples, call_model, device_of, evaluating, to_device, true_precision
from flatminima.parallel import shared
from flatminima.progress import track

EVALUATION_BATCH = 500
"""Samples per forward pass."""


@dataclass(frozen=True)
class Evaluation:
    """A network's mean loss on a data set, and how many samples it classifies rightly (None for other losses)."""

    loss: float
    correct: int | None
    total: int

    @property
    def accuracy(self) -> float:
        """Fraction classified rightly; an error where the targets are not classes."""
        return self._correct() / self.total

    @property
    def error(self) -> float:
        """Fraction classified wrongly; an error where the targets are not classes."""
        return (self.total - self._correct()) / self.total

    def _correct(self) -> int:
        if self.correct is None:
            raise FlatminimaError("accuracy is defined for the cross entropy alone: read `loss`")
        return self.correct


def evaluate(model: nn.Module, samples: Samples, loss: Loss = "cross_entropy", *, progress: bool = False) -> Evaluation:
    """Evaluate in eval mode, in the parameters' precision; losses are formed and summed in float64.

    Raises:
        NonFiniteError: if a logit or a loss is NaN or infinite.
        FlatminimaError: for targets or a loss of the wrong kind.
    """
    total, correct, classified = 0.0, 0, False
    device = device_of(model)
    with shared(model) as processes, evaluating(model), torch.no_grad(), true_precision():
        for start in track(range(0, len(samples), EVALUATION_BATCH), "training loss", progress):
            indices = range(start, min(start + EVALUATION_BATCH, len(samples)))
            inputs, targets = to_device(processes.attempt(partial(samples.fetch, indices)), device)
            logits = call_model(model, inputs)
            total += per_sample_loss(loss, logits, targets).sum().item()
            classified = is_single_label(loss, logits)
            if classified:
                correct += int((logits.argmax(1) == targets).sum())
    return Evaluation(total / len(samples), correct if classified else None, len(samples))
