"""Embeddings, and entries of a parameter that are the same for all samples: looked up, or taken by number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.gramian.rules.base import ParameterUse, PutBack, extract, positions, rule


@rule(F.embedding, positionwise=True)
def embedding(
    n: int,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[ParameterUse] | None:
    """Look-up table: the output gradients, summed by index."""
    if max_norm is not None or scale_grad_by_freq:
        return None
    indices = input.reshape(n, -1)
    padding = None if padding_idx is None else padding_idx % len(weight)

    def added(total: Tensor, grad: Tensor, start: int, stop: int) -> Tensor:
        chosen = (indices >= start) & (indices < stop)
        if padding is not None:
            chosen = chosen & (indices != padding)
        sample = torch.arange(n, device=indices.device)[:, None].expand_as(indices)[chosen]
        row = sample * (stop - start) + indices[chosen] - start
        return total.reshape(n * (stop - start), -1).index_add(0, row, positions(grad, n)[chosen]).view_as(total)

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return added(grad.new_zeros(n, stop - start, grad.shape[-1]), grad, start, stop)

    return [ParameterUse(weight, rows, input, added=added)]


@extract(F.embedding)
def looked_up(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, PutBack] | None:
    """``F.embedding`` of indices that are the same for all samples."""
    if max_norm is not None or scale_grad_by_freq:
        return None
    indices = input.flatten()
    trained = slice(None) if padding_idx is None else indices != padding_idx % len(weight)

    def put_back(rows: Tensor) -> Tensor:
        of_indices = rows.reshape(len(rows), *indices.shape, -1)
        return rows.new_zeros(len(rows), *weight.shape).index_add(1, indices[trained], of_indices[:, trained])

    return weight, put_back


@extract(torch.Tensor.__getitem__)
def entries(source: Tensor, index: Any) -> tuple[Tensor, PutBack] | None:
    """``p[index]``, by numbers and slices."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or type(part) in (int, slice) for part in index):
        return None

    def put_back(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(len(rows), *source.shape)
        whole[(slice(None), *index)] = rows
        return whole

    return source, put_back


@extract(torch.unsqueeze, torch.Tensor.unsqueeze)
def unsqueezed(input: Tensor, dim: int) -> tuple[Tensor, PutBack]:
    """``p.unsqueeze(dim)``."""
    return input, lambda rows: rows.reshape(len(rows), *input.shape)
