"""The mean loss of a trial's subset and its gradient, at whatever weights the model has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from flatminima.losses import mean_loss
from flatminima.measures.trial import Trial
from flatminima.network import Inputs, call_model, take


def parts_of_subset(trial: Trial) -> Iterator[tuple[Inputs, Tensor]]:
    """The subset's samples, as many at a time as memory holds a forward and backward pass of."""
    for part in trial.chunks:
        yield take(trial.inputs, part), trial.targets[part]


def loss_of_subset(trial: Trial) -> float:
    """The mean loss of the subset."""
    with torch.no_grad():
        return sum(_share(trial, *part).item() for part in parts_of_subset(trial))


def loss_and_gradient(trial: Trial, parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
    """The mean loss of the subset, and its gradient."""
    total, gradient = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for part in parts_of_subset(trial):
        loss = _share(trial, *part)
        total += loss.item()
        for whole, piece in zip(gradient, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True):
            whole += piece
    return total, gradient


def gradients_with_graph(trial: Trial, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[Tensor, ...]]:
    """Gradients that add up to that of the mean loss, one for every part of the subset, to be differentiated again.

    A function that is marked once_differentiable is found in their graph, as the gradient that comes to it has a
    history.
    """
    for part in parts_of_subset(trial):
        loss = _share(trial, *part)
        seed = torch.ones_like(loss, requires_grad=True)
        yield torch.autograd.grad(loss, parameters, seed, create_graph=True, materialize_grads=True)


def _share(trial: Trial, inputs: Inputs, targets: Tensor) -> Tensor:
    """What some of the samples add to the mean loss of the subset."""
    return mean_loss(trial.loss, call_model(trial.model, inputs), targets) * (len(targets) / len(trial.targets))
