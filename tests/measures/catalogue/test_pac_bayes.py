from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flatminima.errors import UndefinedMeasureError
from flatminima.measures import CATALOGUE
from support.trials import trial_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")

SIGMA = CATALOGUE["pac_bayes_sigma"]


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_it_is_where_the_first_tenth_of_predictions_fails(scale: float) -> None:
    """With one input for every sample, its two weights cross at a σ of their own in each of the ten draws."""
    n = 6
    model = nn.Linear(n, 2, bias=False).double()
    y = torch.arange(n) % 2
    torch.manual_seed(0)
    margins = scale * (0.5 + torch.rand(n, dtype=torch.float64))
    model.weight.data = torch.stack([(1 - 2 * y) * margins, torch.zeros(n, dtype=torch.float64)])
    trial = trial_of(model, torch.eye(n, dtype=torch.float64), y)
    generator, crossings = trial.generator(), []
    for _ in range(10):
        noise = torch.randn(2, n, generator=generator, dtype=torch.float32).double()
        towards = -(1 - 2 * y) * (noise[0] - noise[1])
        crossings += (margins / towards)[towards > 0].tolist()
    # Of 60 predictions, 6 may fail, so that the seventh is one too many.
    assert SIGMA.of(trial) == pytest.approx(sorted(crossings)[6], rel=1e-3)
    assert SIGMA.of(trial) == SIGMA.of(trial)


def test_more_noise_is_stood_where_weights_are_larger() -> None:
    """σ is a standard deviation: in proportion to the weights, not to their roots."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    model = nn.Linear(5, 3).double()
    once = SIGMA.of(trial_of(model, x, (y := model(x).argmax(1)), subset_size=6))
    for parameter in model.parameters():
        parameter.data *= 4
    assert SIGMA.of(trial_of(model, x, y, subset_size=6)) == pytest.approx(4 * once, rel=1e-3)
    assert SIGMA.larger_is_better


def test_an_accuracy_that_noise_cannot_lower_has_none() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x = torch.randn(12, 5, dtype=torch.float64)
    wrong = (model(x).argmax(1) + 1) % 3
    assert math.isnan(SIGMA.of(trial_of(model, x, wrong, subset_size=6)))


def test_outputs_that_are_no_predictions_have_none() -> None:
    torch.manual_seed(0)
    trial = trial_of(nn.Linear(5, 3), torch.randn(6, 5), torch.randn(6, 3), loss=nn.MSELoss())
    with pytest.raises(UndefinedMeasureError, match="one label per sample"):
        SIGMA.of(trial)
