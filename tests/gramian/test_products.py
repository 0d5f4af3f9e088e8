"""Products in float32, by whichever library, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatminima.gramian.products import times_own_transpose, times_transposes

TOLERANCE = 1e-5


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@given(b=st.integers(1, 3), m=st.integers(1, 70), n=st.integers(1, 70), k=st.sampled_from([1, 5, 600, 3000]))
@settings(max_examples=30, deadline=None)
def test_times_transposes_equals_float64(b: int, m: int, n: int, k: int) -> None:
    left, right = torch.randn(b, k, m).transpose(1, 2), torch.randn(b, k, n).transpose(1, 2)
    expected = left.double() @ right.double().transpose(1, 2)
    assert relative_error(times_transposes(left, right), expected) < TOLERANCE
    target = torch.empty(b, m, n)
    assert times_transposes(left, right, out=target) is target
    assert relative_error(target, expected) < TOLERANCE


@pytest.mark.parametrize(("m", "k"), [(1, 7), (2, 3), (7, 1), (33, 40), (100, 5000), (101, 4001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_own_transpose_is_whole_and_symmetric(m: int, k: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(m, k, dtype=dtype)
    product = times_own_transpose(matrix)
    assert relative_error(product, matrix.double() @ matrix.double().T) < TOLERANCE
    half = m // 2
    assert torch.equal(product[:half, half:], product[half:, :half].T)


def test_onednn_switched_off() -> None:
    matrix = torch.randn(64, 1000)
    with torch.backends.mkldnn.flags(enabled=False):
        product = times_own_transpose(matrix)
    assert relative_error(times_own_transpose(matrix), product) < TOLERANCE
