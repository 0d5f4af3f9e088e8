from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.gramian.engine import factored_gram
from flatminima.gramian.planning import Piece, Plan
from flatminima.lab.networks.paper import build_model
from support.cases import CASES, Case
from support.oracles import explicit_gram


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gram_equals_explicit_jacobian_product(case: Case) -> None:
    model, inputs, targets = case.build()
    result = factored_gram(model, inputs, targets)
    expected = explicit_gram(model, inputs, targets)
    torch.testing.assert_close(result.matrix(), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    assert result.generic_parameters == case.generic


@pytest.mark.parametrize("name", ["cnn", "resnet20", "wrn28-2", "densenet-bc-100"])
def test_gram_of_the_papers_networks(name: str) -> None:
    """BatchNorm with statistics of real activations; the explicit J of two samples, which take seconds."""
    torch.manual_seed(0)
    model = build_model(name).double()
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 1])
    with torch.no_grad():
        model.train()(x)
    expected = explicit_gram(model, x, y)
    result = factored_gram(model, x, y)
    torch.testing.assert_close(result.matrix(), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    assert result.generic_parameters == ()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_taken_in_slices_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, targets = case.build()
    expected = factored_gram(model, inputs, targets).unit
    for budget in (1, 2000, 10**9):
        monkeypatch.setattr("flatminima.gramian.accumulator.ROWS_BUDGET_BYTES", budget)
        result = factored_gram(model, inputs, targets).unit
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12 * expected.abs().max().item())


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 4),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_any_convolution(n, size, kernel, stride, padding, dilation, groups, seed) -> None:
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(s + 2 * p >= r for s, p, r in zip(size, padding, reach, strict=True)))
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(n, 4, *size, dtype=torch.float64), torch.arange(n) % 3
    model(x)
    expected = explicit_gram(model, x, y)
    actual = factored_gram(model, x, y).matrix()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12 * expected.max().item())


def test_overwritten_activations_are_refused() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            out = self.second(h)
            h.mul_(2)
            return out

    with pytest.raises(FlatminimaError, match="overwritten in place"):
        factored_gram(Overwriting(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), "there are no samples"),
        (torch.zeros(1, 4), torch.tensor(1), "the targets are a single number"),
        (torch.zeros(2, 4), [0, 1], "targets must be a tensor, got list"),
    ],
)
def test_targets_of_no_samples_are_refused(inputs: Tensor, targets: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        factored_gram(nn.Linear(4, 3), inputs, targets)


def test_parameters_hidden_in_custom_operations_take_the_generic_path() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad * weight, (grad * x).sum(0)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight, self.head = nn.Linear(4, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(Scale.apply(torch.tanh(self.first(x)), self.weight))

    model, x, y = Hidden().double(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    result = factored_gram(model, x, y)
    assert "weight" in result.generic_parameters
    torch.testing.assert_close(result.matrix(), explicit_gram(model, x, y))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunks_of_samples_and_passes_over_pieces_give_the_same(case: Case) -> None:
    """Every parameter cut in two, three samples at a time, a pass for every piece."""
    model, inputs, targets = case.build()
    expected = factored_gram(model, inputs, targets)
    passes = []
    for name, parameter in model.named_parameters():
        length = parameter.shape[0] if parameter.dim() else 1
        half = length // 2
        if parameter.requires_grad:
            passes += [(Piece(name, start, stop),) for start, stop in ((0, half), (half, length)) if stop > start]
    plan = Plan(len(targets), 3, tuple(passes), 0, 0, 0)
    result = factored_gram(model, inputs, targets, plan=plan)
    torch.testing.assert_close(result.unit, expected.unit, rtol=1e-10, atol=1e-12 * expected.unit.abs().max().item())
    torch.testing.assert_close(result.loss, expected.loss)
    assert set(result.generic_parameters) == set(expected.generic_parameters)


class Gated(nn.Module):
    """A layer that runs for batches with a gated sample, as a router skips experts that nobody chose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gated, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, gate = torch.tanh(self.first(x)), x[:, :1] > 5
        if gate.any():
            hidden = torch.where(gate, torch.tanh(self.gated(hidden)), hidden)
        return self.head(hidden)


@pytest.mark.parametrize("spot_check", [True, False])
def test_a_layer_that_some_chunks_alone_use_counts_once(spot_check: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Gated().double(), torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    x[6:, 0] += 100
    pieces = tuple(Piece(name, 0, parameter.shape[0]) for name, parameter in model.named_parameters())
    found = factored_gram(model, x, y, plan=Plan(9, 3, (pieces,), 0, 0, 0), spot_check=spot_check)
    torch.testing.assert_close(found.matrix(), explicit_gram(model, x, y))
