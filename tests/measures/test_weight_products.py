"""g_i·w in forward mode, and one sample at a time where that fails, against plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.losses import logit_gradient
from flatminima.measures.weight_products import WeightProducts
from flatminima.network import call_model, tensors_of
from support.cases import CASES, Case
from support.minima import network
from support.oracles import explicit_jacobian

WITHOUT_FORWARD_MODE = ("parametrized", "positions")
"""An operation that has none; and weights read under ``no_grad``, where forward mode goes on."""


class Observed(nn.Module):
    """Counts the passes of a single sample."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.alone = model, 0

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.alone += len(tensors_of((arguments, keywords))[0]) == 1
        return self.model(*arguments, **keywords)


def products(model: nn.Module, inputs: Any, targets: Tensor) -> tuple[Tensor, int]:
    """g_i·w in two chunks, and how many samples were run alone."""
    model = Observed(model.eval())
    weights = [p for p in model.parameters() if p.requires_grad]
    half = (len(targets) + 1) // 2
    unit = WeightProducts(model, weights, inputs, targets, "cross_entropy").at_unit_residuals(
        [slice(0, half), slice(half, len(targets))]
    )
    return unit * logit_gradient("cross_entropy", call_model(model, inputs), targets).log_norm.exp(), model.alone


def expected(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return explicit_jacobian(model, inputs, targets) @ weights


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_are_those_of_plain_autograd(case: Case) -> None:
    model, inputs, targets = case.build()
    held, before = list(model.parameters()), copy.deepcopy(model.state_dict())
    found, alone = products(model, inputs, targets)
    torch.testing.assert_close(found, expected(model, inputs, targets), rtol=1e-9, atol=1e-12)
    assert alone == (len(targets) if case.name in WITHOUT_FORWARD_MODE else 2)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Cube(torch.autograd.Function):
    """Without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class OwnFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


class WeightsInAList(nn.Module):
    """Uses a weight where it cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
        self.used = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.used[0]


@pytest.mark.parametrize("kind", ["own function", "weights in a list", "constant"])
def test_what_forward_mode_cannot_do_or_does_not_see_is_done_one_by_one(kind: str) -> None:
    model, x, y = network(OwnFunction())
    if kind == "weights in a list":
        model = WeightsInAList()
    if kind == "constant":
        model[2].register_forward_hook(lambda layer, arguments, output: output.detach())
        assert products(model, x, y)[0].tolist() == [0] * 12
        return
    found, alone = products(model, x, y)
    torch.testing.assert_close(found, expected(model, x, y), rtol=1e-9, atol=1e-12)
    assert alone == 12


def test_an_error_of_the_model_itself_comes_through() -> None:
    model, x, y = network()
    model[1].register_forward_hook(lambda layer, arguments, output: 1 / 0 if len(output) > 1 else output)
    with pytest.raises(ZeroDivisionError):
        products(model, x, y)


def test_a_linear_networks_product_is_its_loss_gradient_times_the_logits() -> None:
    model, x, y = nn.Linear(6, 4, bias=False).double(), *network()[1:]
    z = model(x).detach()
    torch.testing.assert_close(products(model, x, y)[0], ((z.softmax(1) - F.one_hot(y, 4)) * z).sum(1))
