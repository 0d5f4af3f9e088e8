"""Products of float32 matrices by the faster of the two libraries that PyTorch carries on a CPU.

PyTorch multiplies by BLAS, usually MKL, and convolves by oneDNN. MKL does not use all of a processor that is not
Intel's: on AMD's with AVX-512 it multiplies at half of oneDNN's speed. oneDNN multiplies matrices too, as its linear
layer, and is slower only for small ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatminima.torch_compat import HAS_ONEDNN_LINEAR, onednn_linear

_MIN_SIDE = 32
"""A product with a shorter side than this is left to BLAS, ..."""

_MIN_MULTIPLICATIONS = 2**21
"""... and so is one with fewer multiplications: oneDNN takes some microseconds to begin."""


def has_onednn(tensor: Tensor) -> bool:
    """Whether oneDNN computes with this tensor, unless it is switched off (``torch.backends.mkldnn.flags``)."""
    mkldnn: Any = torch.backends.mkldnn
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and mkldnn.is_available() and mkldnn.enabled


def times_own_transpose(matrix: Tensor) -> Tensor:
    """``matrix matrixᵀ`` of an (m, k) tensor: (m, m). It is symmetric, so a quarter of it is copied, not computed."""
    m, half = len(matrix), len(matrix) // 2
    product = matrix.new_empty(m, m)
    product[:half, :half] = times_transposes(matrix[None, :half], matrix[None, :half])[0]
    product[half:] = times_transposes(matrix[None, half:], matrix[None])[0]
    product[:half, half:] = product[half:, :half].T
    return product


def times_transposes(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``left[i] right[i]ᵀ`` of a (b, m, k) and a (b, n, k) tensor: (b, m, n)."""
    if not _suits_onednn(left, right):
        return torch.bmm(left, right.transpose(1, 2), out=out)
    if out is None:
        out = left.new_empty(len(left), left.shape[1], right.shape[1])
    for a, b, target in zip(left, right.contiguous(), out, strict=True):
        # The linear layer's weight must lie row by row, or it takes a hundred times as long.
        target.copy_(onednn_linear(a, b))
    return out


def _suits_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN is there for this product, and likely to be faster."""
    m, n, k = left.shape[1], *right.shape[1:]
    return (
        has_onednn(left)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and min(m, n) >= _MIN_SIDE
        and m * n * k >= _MIN_MULTIPLICATIONS
        and HAS_ONEDNN_LINEAR
    )
