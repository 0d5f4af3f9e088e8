from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatminima as fm
from flatminima.errors import UndefinedMeasureError
from flatminima.sampling import draw_subsets
from support.minima import network, value_of
from support.oracles import explicit_jacobian

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")


def test_coherence_is_the_mean_cosine_of_pairs_overall_within_classes_and_between() -> None:
    model, x, y = network()
    rows = F.normalize(explicit_jacobian(model, x, y))
    pairs = [(i, j) for i in range(12) for j in range(i)]
    within = [(i, j) for i, j in pairs if y[i] == y[j]]
    between = [(i, j) for i, j in pairs if y[i] != y[j]]
    for measure, chosen in (("coherence", pairs), ("coherence_within", within), ("coherence_between", between)):
        expected = torch.stack([rows[i] @ rows[j] for i, j in chosen]).mean().item()
        assert value_of(measure, model, (x, y)) == pytest.approx(expected, rel=1e-9)


def test_pairs_that_a_subset_lacks_have_no_coherence() -> None:
    model, x, y = network()
    assert math.isnan(value_of("coherence_between", model, (x, torch.zeros_like(y))))
    assert math.isnan(value_of("coherence_within", model, (x[:4], y[:4])))


@pytest.mark.filterwarnings("ignore::flatminima.errors.SingularTrialWarning")
def test_samples_without_a_gradient_are_left_out() -> None:
    _, x, y = network()
    model = nn.Linear(6, 4, bias=False).double()
    x[5] = 0
    c = fm.measure(model, (x, y), subset_size=6, trials=6, measures="free", on_singular="skip", progress=False)
    assert 0 < len(c.singular_trials) < 6
    for subset, found in zip(draw_subsets(12, 6, 6, 0), c.estimates()["coherence"].per_trial, strict=True):
        kept = [i for i in subset if i != 5]
        cosines = F.normalize(explicit_jacobian(model, x[kept], y[kept]))
        expected = (cosines.sum(0).square().sum() - len(kept)) / (len(kept) * (len(kept) - 1))
        assert found == pytest.approx(expected.item(), rel=1e-9)


def test_targets_that_are_no_classes_have_an_overall_coherence_alone() -> None:
    model, x, _ = network()
    y = torch.randn(12, 4, dtype=torch.float64)
    assert -1 < value_of("coherence", model, (x, y), loss=nn.MSELoss()) < 1
    with pytest.raises(UndefinedMeasureError, match="coherence_within is not defined here: the targets are not one"):
        value_of("coherence_within", model, (x, y), loss=nn.MSELoss())
