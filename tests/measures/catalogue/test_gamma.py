"""γ̂ taken apart, against plain autograd: residual, sensitivity and diversity by their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import UnequalLossWarning
from flatminima.gramian import factored_gram, log_determinant_parts
from flatminima.measures import Characterization
from flatminima.network import call_model
from support.cases import CASES, Case
from support.oracles import explicit_gram

PARTS = ("residual", "sensitivity", "diversity", "log_det_unit_fisher")


def norms_at_the_logits(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
    logits = call_model(model.eval(), inputs).detach().requires_grad_()
    (delta,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    return delta.norm(dim=1)


@pytest.mark.filterwarnings("ignore::flatminima.errors.GenericPathWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_parts_are_those_of_plain_autograd_and_add_up(case: Case) -> None:
    model, inputs, targets = case.build()
    xi = explicit_gram(model, inputs, targets)
    if torch.linalg.matrix_rank(xi) < len(xi):
        pytest.skip("ξ is singular")
    parts = log_determinant_parts(factored_gram(model, inputs, targets, spot_check=False))
    delta, norms = norms_at_the_logits(model, inputs, targets), xi.diagonal().sqrt()
    assert parts.residual == pytest.approx(2 * delta.log().sum().item(), abs=1e-8)
    assert parts.sensitivity == pytest.approx(2 * (norms / delta).log().sum().item(), abs=1e-8)
    correlation = xi / norms[:, None] / norms
    assert parts.diversity == pytest.approx(torch.linalg.slogdet(correlation)[1].item(), abs=1e-6)
    assert parts.total == pytest.approx(torch.linalg.slogdet(xi)[1].item(), abs=1e-6)
    assert parts.at_unit_residuals == parts.sensitivity + parts.diversity


def separated(scale: float, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Three classes far apart, whose loss falls with the scale of the weights."""
    torch.manual_seed(0)
    y = torch.arange(30) % 3
    x = F.one_hot(y, 12) + 0.1 * torch.randn(30, 12)
    model = nn.Linear(12, 3)
    model.weight.data.copy_(scale * torch.eye(3, 12))
    model.bias.data.zero_()
    return model.to(dtype), x.to(dtype), y


@pytest.mark.parametrize("scale", [2.5, 11.0, 21.0, 28.0])
def test_float32_has_the_parts_of_float64_from_a_loss_of_a_tenth_to_one_of_1e_12(scale: float) -> None:
    low, high = (
        fm.measure(model, (x, y), subset_size=10, trials=2, progress=False)
        for model, x, y in (separated(scale, torch.float32), separated(scale, torch.float64))
    )
    for part in PARTS:
        assert getattr(low, part).mean == pytest.approx(getattr(high, part).mean, abs=2e-3), part
    assert 1e-13 < high.train_loss < 0.2


def test_the_parts_add_up_trial_by_trial_and_come_back_from_json() -> None:
    model, x, y = separated(5.0, torch.float64)
    c = fm.measure(model, (x, y), subset_size=8, trials=3, progress=False)
    whole, *parts = (c.estimates()[name].per_trial for name in ("log_det_fisher", *PARTS[:3]))
    assert [sum(values) for values in zip(*parts, strict=True)] == pytest.approx(whole, abs=1e-10)
    assert Characterization.from_json(c.to_json()) == c
    assert "residual" in str(c)


def test_with_batch_statistics_there_are_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    _, x, y = separated(5.0, torch.float64)
    with pytest.warns(UserWarning, match="too far from a minimum"):
        c = fm.measure(model, (x, y), subset_size=10, trials=2, batchnorm=5, progress=False)
    assert [getattr(c, part) for part in PARTS] == [None] * 4
    assert math.isfinite(c.log_det_fisher.mean)


def test_rescaling_a_loss_moves_the_residual_alone() -> None:
    model, x, y = separated(5.0, torch.float64)
    one, ten = (
        fm.measure(
            model,
            (x, y),
            loss=lambda z, t, factor=factor: factor * F.cross_entropy(z, t, reduction="none"),
            subset_size=10,
            trials=1,
            progress=False,
        )
        for factor in (1.0, 10.0)
    )
    assert ten.residual.mean - one.residual.mean == pytest.approx(20 * math.log(10))
    for part in PARTS[1:]:
        assert getattr(ten, part).mean == pytest.approx(getattr(one, part).mean, abs=1e-8)


def test_a_comparison_says_how_much_of_the_difference_is_residual() -> None:
    models = {name: separated(scale, torch.float64)[0] for name, scale in (("near", 4.0), ("far", 8.0))}
    _, x, y = separated(1.0, torch.float64)
    with pytest.warns(UnequalLossWarning) as warned:
        comparison = fm.compare(models, (x, y), subset_size=10, trials=3, progress=False)
    residual, whole = (comparison.difference("near", "far", name).mean for name in ("residual", "log_det_fisher"))
    assert f"{residual:+.0f} of the {whole:+.0f}" in str(warned[0].message)
