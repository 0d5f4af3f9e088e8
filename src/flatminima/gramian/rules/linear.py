"""Linear layers and products of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.gramian.products import times_transposes
from flatminima.gramian.rules.base import ParameterUse, bias_use, positions, rule


@rule(F.linear, positionwise=True)
def linear(n: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[ParameterUse]:
    """``y = x Wᵀ + b``: one outer product per position, summed over a sample's positions."""
    x = positions(input, n)

    def weight_rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return times_transposes(positions(grad, n)[:, :, start:stop].transpose(1, 2), x.transpose(1, 2))

    def weight_product(grad: Tensor, start: int, stop: int) -> Tensor:
        return (g := positions(grad, n)[:, 0, start:stop]) @ g.T * (x[:, 0] @ x[:, 0].T)

    single_position = x.shape[1] == 1
    return [
        ParameterUse(weight, weight_rows, input, weight_product if single_position else None),
        *bias_use(bias, n, channel_last=True),
    ]


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, positionwise=True)
def matmul(n: int, input: Tensor, other: Tensor) -> list[ParameterUse] | None:
    """``y = x W`` with a two-dimensional W of shape (in, out)."""
    if other.dim() != 2 or input.dim() < 2:
        return None
    x = positions(input, n)

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return times_transposes(x[:, :, start:stop].transpose(1, 2), positions(grad, n).transpose(1, 2))

    return [ParameterUse(other, rows, input)]


@rule(torch.addmm)
def addmm(
    n: int, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> list[ParameterUse] | None:
    """``y = b + x W`` (transformers' ``Conv1D``)."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return None
    return [*(matmul(n, mat1, mat2) or []), *bias_use(input, n, channel_last=True)]
