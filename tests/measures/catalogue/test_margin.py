from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from flatminima.errors import UndefinedMeasureError
from support.minima import network, value_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")


def test_margin_is_the_tenth_percentile_of_the_labels_lead() -> None:
    model, x, y = network()
    z = model(x).detach().numpy()
    leads = [row[label] - max(np.delete(row, label)) for row, label in zip(z, y.tolist(), strict=True)]
    expected = np.percentile(leads, 10)
    assert value_of("margin", model, (x, y)) == pytest.approx(expected, rel=1e-9)
    assert value_of("margin", model, (x, y), memory_budget=20_000) == pytest.approx(expected, rel=1e-9)


def test_outputs_or_targets_that_are_no_classes_have_none() -> None:
    model, x, _ = network()
    with pytest.raises(UndefinedMeasureError, match="targets are not one class per sample"):
        value_of("margin", model, (x, torch.randn(12, 4, dtype=torch.float64)), loss=nn.MSELoss())
    one = nn.Linear(6, 1).double()
    with pytest.raises(UndefinedMeasureError, match=r"outputs of shape \(N, 1\) are no logits of one class per sample"):
        value_of("margin", one, (x, torch.rand(12, 1).double()), loss=nn.BCEWithLogitsLoss(), subset_size=4)


def test_labels_may_be_bytes_as_for_the_cross_entropy() -> None:
    model, x, y = network()
    assert value_of("margin", model, (x, y.to(torch.uint8))) == value_of("margin", model, (x, y))
