"""The mean loss of a trial's subset and its gradient, at whatever weights the model has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from flatminima.losses import mean_loss
from flatminima.measures.trial import Trial
from flatminima.network import Inputs, call_model, call_model_without_graph, take


def parts_of_subset(trial: Trial) -> Iterator[tuple[Inputs, Tensor]]:
    """The subset's samples, as many at a time as memory holds a forward and backward pass of."""
    for part in trial.chunks:
        yield take(trial.inputs, part), trial.targets[part]


def loss_of_subset(trial: Trial) -> float:
    """The mean loss of the subset at the weights as they are."""
    outputs = ((call_model_without_graph(trial.model, inputs), targets) for inputs, targets in parts_of_subset(trial))
    return sum(_share(trial, logits, targets).item() for logits, targets in outputs)


def loss_and_gradient(trial: Trial, parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
    """The mean loss of the subset, and its gradient."""
    total, gradient = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in parts_of_subset(trial):
        loss = _share(trial, call_model(trial.model, inputs), targets)
        total += loss.item()
        for whole, piece in zip(gradient, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True):
            whole += piece
    return total, gradient


def gradients_with_graph(trial: Trial, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[Tensor, ...]]:
    """Gradients that add up to that of the mean loss, one for every part of the subset, to be differentiated again.

    A function that is marked once_differentiable is found in their graph, as the gradient that comes to it has a
    history.
    """
    for inputs, targets in parts_of_subset(trial):
        loss = _share(trial, call_model(trial.model, inputs), targets)
        seed = torch.ones_like(loss, requires_grad=True)
        yield torch.autograd.grad(loss, parameters, seed, create_graph=True, materialize_grads=True)


def _share(trial: Trial, logits: Tensor, targets: Tensor) -> Tensor:
    """What some samples add to the mean loss of the subset."""
    return mean_loss(trial.loss, logits, targets) * (len(targets) / len(trial.targets))
