from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import jacrev

from flatminima.measures.robustness import input_jacobian_norms


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, classes)
    ).double()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 10.0])
def test_equals_spectral_norm_of_the_explicit_jacobian(sharpness: float) -> None:
    model, x = network().eval(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    model[-1].weight.data *= sharpness
    expected = [
        torch.linalg.matrix_norm(jacrev(lambda z: model(z[None])[0].softmax(0))(sample).flatten(1), 2) ** 2
        for sample in x
    ]
    torch.testing.assert_close(input_jacobian_norms(model, x), torch.stack(expected), rtol=1e-8, atol=1e-30)


def test_float32_agrees_with_float64_where_p_is_one_hot() -> None:
    """p_y = 1 in float32 here: S formed by 1 − p_y would be exactly zero."""
    model, x = network(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    model[-1].weight.data *= 60
    expected = input_jacobian_norms(model, x)
    assert 0 < expected.min() < 1e-20
    torch.testing.assert_close(input_jacobian_norms(model.float(), x.float()), expected, rtol=2e-3, atol=0)


def test_leaves_the_model_as_it_was() -> None:
    model, x = network().train(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    model[0].requires_grad_(False)
    input_jacobian_norms(model, x)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
