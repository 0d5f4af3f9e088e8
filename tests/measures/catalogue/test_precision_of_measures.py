"""The measures in float32 against float64, from a loss of a tenth to one of 1e-9."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

import flatminima as fm
from flatminima.errors import NotAMinimumWarning
from support.minima import fitted

LOSSES = (1e-1, 1e-3, 1e-6, 1e-9)


WAYS = [(("cheap", "adaptive_average_sharpness"), fisher, loss) for fisher in ("empirical", "model") for loss in LOSSES]


@pytest.mark.parametrize(("measures", "fisher", "loss"), [*WAYS, ("all", "empirical", 1e-6)])
def test_float32_has_the_measures_of_float64(measures: str | tuple[str, ...], fisher: str, loss: float) -> None:
    model, x, y = fitted(loss, torch.float32)
    options = {"subset_size": 12, "trials": 1, "measures": measures, "fisher": fisher, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotAMinimumWarning)
        single = fm.measure(model, (x, y), **options)
        double = fm.measure(copy.deepcopy(model).double(), (x.double(), y), **options)
    assert double.train_loss == pytest.approx(loss, rel=1e-2)
    assert single.settings.left_out == double.settings.left_out
    found, expected = single.estimates(), double.estimates()
    assert len(expected) > 15
    for name, estimate in expected.items():
        assert not math.isinf(estimate.mean)
        assert found[name].per_trial == pytest.approx(estimate.per_trial, rel=1e-3, nan_ok=True), name
