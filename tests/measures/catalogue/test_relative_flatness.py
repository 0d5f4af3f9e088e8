from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import UndefinedMeasureError
from support.minima import network, value_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")


def test_it_is_petzka_et_als_sum_over_blocks_of_the_last_layers_fisher_information() -> None:
    """Σ_st ⟨w_s, w_t⟩ tr F_st by plain autograd, with the last layer alone trainable."""
    model, x, y = network()
    expected_of = nn.Sequential(*model)
    expected_of[0].requires_grad_(False)
    blocks = fm.exact_fisher(expected_of, x, y).view(4, 8, 4, 8)
    expected = weighted_traces(model[2].weight.detach(), blocks)
    model[0].requires_grad_(True)
    assert value_of("relative_flatness", model, (x, y)) == pytest.approx(expected, rel=1e-9)


def weighted_traces(W: Tensor, blocks: Tensor) -> float:
    return ((W @ W.T) * torch.einsum("sdtd->st", blocks)).sum().item()


def test_on_average_over_the_networks_own_labels_it_is_the_hessians() -> None:
    model, x, y = network()
    p = model(x[:1]).detach().softmax(1)[0]
    found = sum(p[c].item() * value_of("relative_flatness", model, (x[:1], torch.tensor([c]))) for c in range(4))
    model[0].requires_grad_(False)
    hessian = fm.exact_hessian(model, x[:1], y[:1]).view(4, 8, 4, 8)
    assert found == pytest.approx(weighted_traces(model[2].weight.detach(), hessian), rel=1e-9)


def test_a_bias_a_frozen_layer_and_a_memory_budget_change_nothing() -> None:
    model, x, y = network()
    expected = value_of("relative_flatness", model, (x, y))
    assert value_of("relative_flatness", model, (x, y), memory_budget=20_000) == pytest.approx(expected, rel=1e-9)
    model[2].requires_grad_(False)
    assert value_of("relative_flatness", model, (x, y)) == pytest.approx(expected, rel=1e-9)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.head(input=x)


def test_the_layer_is_the_one_that_the_logits_come_from() -> None:
    model, (x, y) = ByKeyword().double(), network()[1:]
    difference = model(x).detach().softmax(1) - F.one_hot(y, 4)
    back = difference @ model.head.weight.detach()
    expected = (back.square().sum(1) * x.square().sum(1)).mean().item()
    assert value_of("relative_flatness", model, (x, y)) == pytest.approx(expected, rel=1e-9)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "no linear layer": lambda: nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1), nn.Flatten()),
    "something after it": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()),
    "a layer within vmap": lambda: Within(),
    "a mean over positions": lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 4), Mean()),
}


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.head)(x)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize("kind", OTHERS)
def test_networks_without_a_last_linear_layer_are_refused(kind: str) -> None:
    _, x, y = network()
    with pytest.raises(UndefinedMeasureError, match=r"not those of a last torch\.nn\.Linear"):
        value_of("relative_flatness", OTHERS[kind]().double(), (x, y), subset_size=4)
