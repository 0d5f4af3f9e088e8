"""The mean loss of a trial's subset, or of whole data, and its gradient, at whatever weights the model has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from flatminima.gramian import trainable_parameters
from flatminima.losses import Loss, mean_loss
from flatminima.measures.trial import Trial
from flatminima.network import (
    Inputs,
    Samples,
    call_model,
    call_model_without_graph,
    device_of,
    index_batches,
    to_device,
)


@dataclass(frozen=True)
class DataSurface:
    """The mean loss over whole data, as a trial has that of its subset.

    Attributes:
        model: in eval mode.
        samples: the data.
        loss: of the mean.
        samples_at_once: as many as memory holds a forward and backward pass of.
    """

    model: nn.Module
    samples: Samples
    loss: Loss
    samples_at_once: int

    @property
    def size(self) -> int:
        """N, samples that the loss is the mean of."""
        return len(self.samples)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return trainable_parameters(self.model)

    def parts(self) -> Iterator[tuple[Inputs, Tensor]]:
        """The samples on the model's device, some at a time."""
        for indices in index_batches(self.size, self.samples_at_once):
            yield to_device(self.samples.fetch(indices), device_of(self.model))


Surface = Trial | DataSurface
"""What the mean loss is over."""


def loss_of_subset(surface: Surface) -> float:
    """The mean loss of the subset at the weights as they are."""
    outputs = ((call_model_without_graph(surface.model, inputs), targets) for inputs, targets in surface.parts())
    return sum(_share(surface, logits, targets).item() for logits, targets in outputs)


def loss_and_gradient(surface: Surface, parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
    """The mean loss of the subset, and its gradient."""
    total, gradient = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in surface.parts():
        loss = _share(surface, call_model(surface.model, inputs), targets)
        total += loss.item()
        for whole, piece in zip(gradient, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True):
            whole += piece
    return total, gradient


def gradients_with_graph(surface: Surface, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[Tensor, ...]]:
    """Gradients that add up to that of the mean loss, one for every part of the subset, to be differentiated again.

    A function that is marked once_differentiable is found in their graph, as the gradient that comes to it has a
    history.
    """
    for inputs, targets in surface.parts():
        loss = _share(surface, call_model(surface.model, inputs), targets)
        seed = torch.ones_like(loss, requires_grad=True)
        yield torch.autograd.grad(loss, parameters, seed, create_graph=True, materialize_grads=True)


def _share(surface: Surface, logits: Tensor, targets: Tensor) -> Tensor:
    """What some samples add to the mean loss of the subset."""
    return mean_loss(surface.loss, logits, targets) * (len(targets) / surface.size)
