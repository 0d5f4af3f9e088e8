from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatminima as fm
from flatminima.errors import UndefinedMeasureError
from support.minima import fitted, network, value_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")


def test_it_is_the_quadratic_form_of_the_exact_fisher_information() -> None:
    model, x, y = network()
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = (w @ fm.exact_fisher(model, x, y) @ w).item()
    assert value_of("fisher_rao_norm", model, (x, y)) == pytest.approx(expected, rel=1e-9)


def test_for_relu_networks_without_biases_it_is_liang_et_als_closed_form() -> None:
    """L² mean ⟨δ_i, z_i⟩² for L layers: the network is homogeneous."""
    _, x, y = network()
    torch.manual_seed(3)
    layers = [
        nn.Linear(6, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 4, bias=False),
    ]
    model = nn.Sequential(*layers).double()
    z = model(x).detach()
    inner = ((z.softmax(1) - F.one_hot(y, 4)) * z).sum(1)
    expected = 9 * inner.square().mean().item()
    assert value_of("fisher_rao_norm", model, (x, y)) == pytest.approx(expected, rel=1e-9)
    rescaled = copy.deepcopy(model)
    rescaled[0].weight.data *= 5
    rescaled[4].weight.data /= 5
    assert value_of("fisher_rao_norm", rescaled, (x, y)) == pytest.approx(expected, rel=1e-9)
    assert value_of("fisher_rao_norm", model, (x, y), scale_invariant=True) == pytest.approx(expected, rel=1e-9)


def test_a_memory_budget_changes_nothing() -> None:
    model, x, y = fitted(1e-2)
    expected = value_of("fisher_rao_norm", model, (x, y))
    assert value_of("fisher_rao_norm", model, (x, y), memory_budget=40_000) == pytest.approx(expected, rel=1e-9)


def test_it_is_of_the_loss_at_normalized_logits_where_that_is_measured() -> None:
    model, x, y = network()
    z = model(x)
    loss = F.cross_entropy(z / (0.5 * z.norm(dim=1, keepdim=True)), y, reduction="none")
    weights = list(model.parameters())
    rows = [torch.autograd.grad(one, weights, retain_graph=True) for one in loss]
    expected = sum(sum((g * w).sum() for g, w in zip(row, weights, strict=True)).item() ** 2 for row in rows) / 12
    assert value_of("fisher_rao_norm", model, (x, y), logit_normalization=0.5) == pytest.approx(expected, rel=1e-9)


def test_what_has_no_gradients_of_single_samples_is_refused() -> None:
    model, x, y = fitted(1e-2)
    for options in ({"fisher": "model"}, {"batchnorm": 6}):
        with pytest.raises(UndefinedMeasureError, match="fisher_rao_norm is not defined here"):
            value_of("fisher_rao_norm", model, (x, y), **options)
