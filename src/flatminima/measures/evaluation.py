"""The mean loss and the accuracy over a data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from flatminima.errors import FlatminimaError
from flatminima.gramian import unwrapped
from flatminima.losses import Loss, is_single_label, per_sample_loss, refuse_non_finite
from flatminima.network import (
    Inputs,
    Samples,
    call_model_without_graph,
    device_of,
    evaluating,
    explained_errors,
    index_batches,
    tensors_of,
    to_device,
    true_precision,
    undisturbed,
)
from flatminima.parallel import Processes, shared, without_exchanges
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
        FlatminimaError: for inputs that the model does not take, and targets or a loss of the wrong kind.
    """
    evaluated = Evaluating(model, samples, loss)
    with undisturbed(unwrapped(model)), evaluated.running():
        for indices in track(index_batches(len(samples), batch), "training loss", progress):
            evaluated.add(indices)
    return evaluated.result()


class Evaluating:
    """The evaluation of one model as it grows, batch by batch; arguments and errors as of :func:`evaluate`."""

    def __init__(self, model: nn.Module, samples: Samples, loss: Loss) -> None:
        self._model, self._samples, self._loss = without_exchanges(model), samples, loss
        self._losses = torch.empty(len(samples), dtype=torch.float64, device="cpu")
        self._correct, self._classified = 0, False
        self._processes = Processes()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Batches are added in this block, the model in eval mode."""
        with shared(self._model) as self._processes, evaluating(self._model), torch.no_grad(), true_precision():
            yield

    def add(self, indices: range) -> None:
        """Evaluate the samples at ``indices``."""
        batch = self._processes.attempt(partial(self._samples.fetch, indices))
        inputs, targets = to_device(batch, device_of(self._model))
        with explained_errors(self._model, inputs):
            logits = call_model_without_graph(self._model, inputs)
        refuse_non_finite("logits", logits, first=indices.start, why=_why_not_finite(inputs))
        self._losses[indices.start : indices.stop] = per_sample_loss(self._loss, logits, targets)
        self._classified = is_single_label(self._loss, logits)
        if self._classified:
            self._correct += int((logits.argmax(1) == targets).sum())

    def result(self) -> Evaluation:
        """Once all samples are added."""
        mean = self._losses.sum().item() / len(self._losses)  # summed at the end: the same for batches of any size
        return Evaluation(mean, self._correct if self._classified else None, len(self._losses))


def _why_not_finite(inputs: Inputs) -> str:
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors_of(inputs))
    return "" if finite else "; the inputs themselves hold NaN or infinity (missing values?)"
