"""Derivatives of gradients: what they need of a forward pass, and what is said where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatminima.errors import UndefinedMeasureError, first_line
from flatminima.torch_compat import eager_stance, graph_of, has_no_derivative, raises_when_differentiated

PASSES_AT_ONCE = 3
"""A second derivative takes the memory of so many forward and backward passes, as it goes back through both."""


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """A context for forward passes: what is compiled or fused (attention) has no second derivative."""
    with eager_stance(), sdpa_kernel(SDPBackend.MATH):
        yield


def require_second_derivative(gradient: Sequence[Tensor]) -> None:
    """Refuse a gradient with a graph that goes through a function marked once_differentiable.

    Raises:
        UndefinedMeasureError: there is such a function.
    """
    if any(raises_when_differentiated(node) for node in graph_of(gradient)):
        raise _no_second_derivative("a function is marked once_differentiable")


def differentiated(
    gradient: Sequence[Tensor], inputs: Sequence[Tensor], along: Sequence[Tensor], *, retain_graph: bool
) -> tuple[Tensor, ...]:
    """Derivatives with respect to ``inputs`` of a gradient's product with ``along``; zero where there is no path.

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
