from __future__ import annotations

import pytest
import torch

from cases import CASES, Case
from flatminima.gramian import factored_gram
from oracles import explicit_gram


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gram_equals_explicit_jacobian_product(case: Case) -> None:
    model, inputs, targets = case.build()
    result = factored_gram(model, inputs, targets)
    expected = explicit_gram(model, inputs, targets)
    torch.testing.assert_close(result.matrix(), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    assert result.generic_parameters == case.generic
