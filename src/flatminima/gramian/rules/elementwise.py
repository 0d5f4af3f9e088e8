"""Sums and products with a parameter that is broadcast over the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatminima.gramian.rules.base import ParameterUse, rule, sum_positions


@rule(torch.Tensor.add_, torch.Tensor.__iadd__)
@rule(torch.add, torch.Tensor.add, commutative=True)
def add(n: int, input: Tensor, other: Tensor, *, alpha: float = 1) -> list[ParameterUse] | None:
    """``y = x + p`` with a broadcast parameter."""
    if alpha != 1:
        return None
    return broadcast_use(n, input, other, lambda grad: grad)


@rule(torch.Tensor.expand)
def expand(n: int, input: Tensor, *sizes: Any, **size: Any) -> list[ParameterUse] | None:
    """``p.expand(N, ...)``: one copy of the parameter per sample (class tokens)."""
    shape = input.expand(*sizes, **size)
    return broadcast_use(n, shape, input, lambda grad: grad) if shape.shape[0] == n else None


@rule(torch.mul, torch.Tensor.mul, commutative=True)
def multiply(n: int, input: Tensor, other: Tensor) -> list[ParameterUse] | None:
    """``y = x · p`` with a broadcast parameter (layer scale, hand-written RMSNorm)."""
    return broadcast_use(n, input, other, lambda grad: grad * input, reads=input)


def broadcast_use(
    n: int, x: Tensor, parameter: Tensor, at_output: Callable[[Tensor], Tensor], reads: Tensor | None = None
) -> list[ParameterUse] | None:
    """A parameter broadcast over the samples: its rows are ``at_output(grad)`` summed over the broadcast dimensions."""
    lead = x.dim() - parameter.dim()
    padded = (1,) * lead + tuple(parameter.shape)
    if lead < 0 or padded[0] != 1:
        return None

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        values = at_output(grad)
        summed = [d for d in range(1, values.dim()) if padded[d] == 1 and values.shape[d] != 1]
        if summed:
            values = values.sum(summed, keepdim=True)
        return sum_positions(values.reshape(-1, *(parameter.shape or (1,))), n)[:, start:stop]

    return [ParameterUse(parameter, rows, reads)]
