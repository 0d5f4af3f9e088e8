"""Derivatives of gradients, and what is said where there are none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatminima.errors import UndefinedMeasureError, first_line
from flatminima.torch_compat import graph_of, has_no_derivative, raises_when_differentiated

PASSES_AT_ONCE = 3
"""A second derivative takes the memory of so many forward and backward passes, as it goes back through both."""


def require_second_derivative(gradient: Sequence[Tensor]) -> None:
    """Refuse a gradient with a graph that goes through a function marked once_differentiable.

    Raises:
        UndefinedMeasureError: there is such a function.
    """
    if any(raises_when_differentiated(node) for node in graph_of(gradient)):
        raise _no_second_derivative("a function is marked once_differentiable")


def differentiated(
    gradient: Sequence[Tensor], inputs: Sequence[Tensor], along: Sequence[Tensor] | None = None, *, retain_graph: bool
) -> tuple[Tensor, ...]:
    """Derivatives with respect to ``inputs`` of a gradient's product with ``along``; zero where there is no path.

    Without ``along`` the gradient is a single number.

    Raises:
        UndefinedMeasureError: an operation has no second derivative.
    """
    try:
        return torch.autograd.grad(gradient, inputs, along, retain_graph=retain_graph, materialize_grads=True)
    except RuntimeError as error:
        if not has_no_derivative(error):
            raise
        raise _no_second_derivative(first_line(error)) from error


def _no_second_derivative(reason: str) -> UndefinedMeasureError:
    return UndefinedMeasureError(f"an operation of the model has no second derivative: {reason}")
