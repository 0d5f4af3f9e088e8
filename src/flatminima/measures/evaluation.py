"""The mean loss and the accuracy over a data set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from flatminima.errors import FlatminimaError
from flatminima.losses import Loss, is_single_label, per_sample_loss, refuse_non_finite
from flatminima.network import (
    Inputs,
    Samples,
    call_model_without_graph,
    device_of,
    evaluating,
    tensors_of,
    to_device,
    true_precision,
)
from flatminima.parallel import shared
from flatminima.progress import track

EVALUATION_BATCH = 500
"""Samples per forward pass, at most."""


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


def evaluate(
    model: nn.Module,
    samples: Samples,
    loss: Loss = "cross_entropy",
    *,
    batch: int = EVALUATION_BATCH,
    progress: bool = False,
) -> Evaluation:
    """Evaluate in eval mode, in the parameters' precision; losses are formed and summed in float64.

    Args:
        model: the model.
        samples: the data set.
        loss: see :data:`flatminima.losses.Loss`.
        batch: samples per forward pass.
        progress: show a bar.

    Raises:
        NonFiniteError: if a logit or a loss is NaN or infinite.
        FlatminimaError: for targets or a loss of the wrong kind.
    """
    losses = torch.empty(len(samples), dtype=torch.float64, device="cpu")
    correct, classified = 0, False
    device = device_of(model)
    with shared(model) as processes, evaluating(model), torch.no_grad(), true_precision():
        for start in track(range(0, len(samples), batch), "training loss", progress):
            indices = range(start, min(start + batch, len(samples)))
            inputs, targets = to_device(processes.attempt(partial(samples.fetch, indices)), device)
            logits = call_model_without_graph(model, inputs)
            refuse_non_finite("logits", logits, first=start, why=_why_not_finite(inputs))
            losses[indices.start : indices.stop] = per_sample_loss(loss, logits, targets)
            classified = is_single_label(loss, logits)
            if classified:
                correct += int((logits.argmax(1) == targets).sum())
    mean = losses.sum().item() / len(samples)  # summed at the end: the same for batches of any size
    return Evaluation(mean, correct if classified else None, len(samples))


def _why_not_finite(inputs: Inputs) -> str:
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors_of(inputs))
    return "" if finite else "; the inputs themselves hold NaN or infinity (missing values?)"
