"""Entries taken out of a parameter without looking at the samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flatminima.gramian.rules.base import PutBack


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


def unsqueezed(source: Tensor, dim: int) -> tuple[Tensor, PutBack]:
    """``p.unsqueeze(dim)``."""
    return source, lambda rows: rows.reshape(len(rows), *source.shape)
