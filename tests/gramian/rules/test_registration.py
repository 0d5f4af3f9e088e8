"""Rules of a user's own, for a function of their own or in the place of one of ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import flatminima as fm
from flatminima.errors import FlatminimaError, GenericPathWarning
from flatminima.gramian.rules import (
    EXTRACTS,
    RULES,
    SPLITS,
    ParameterUse,
    extract,
    positions,
    rule,
    split,
    temporary_rules,
)
from support.oracles import explicit_gram


class Swish(torch.autograd.Function):
    """x · sigmoid(s x), as people write fused operations: a backward of its own, no call that can be seen."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return x * torch.sigmoid(slope * x)

    @staticmethod
    def backward(ctx, grad):
        x, slope = ctx.saved_tensors
        s = torch.sigmoid(slope * x)
        at_slope = (grad * x.square() * s * (1 - s)).sum(tuple(range(x.dim() - 1)))
        return grad * (s + slope * x * s * (1 - s)), at_slope


@wrap_torch_function(lambda x, slope: (x, slope))
def swish(x: Tensor, slope: Tensor) -> Tensor:
    return Swish.apply(x, slope)


@torch.library.custom_op("flatminima_tests::scaled", mutates_args=())
def scaled(x: Tensor, by: Tensor) -> Tensor:
    return x * by


@scaled.register_fake
def _(x: Tensor, by: Tensor) -> Tensor:
    return torch.empty_like(x)


def scaled_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, by = ctx.saved_tensors
    return grad * by, (grad * x).sum(tuple(range(x.dim() - 1)))


scaled.register_autograd(scaled_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.slope, self.scale = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(scaled(swish(self.first(x), self.slope), self.scale).mean(1))


@pytest.fixture(autouse=True)
def _without_consequences() -> Iterator[None]:
    with temporary_rules():
        yield


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Network().double(), torch.randn(5, 2, 4, dtype=torch.float64), torch.arange(5) % 3


def rule_of_slope(n: int, x: Tensor, slope: Tensor) -> list[ParameterUse]:
    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        s = torch.sigmoid(slope * x)
        return positions(grad * x.square() * s * (1 - s), n).sum(1)[:, start:stop]

    return [ParameterUse(slope, rows, reads=x)]


def rule_of_scale(n: int, x: Tensor, by: Tensor) -> list[ParameterUse]:
    return [ParameterUse(by, lambda grad, start, stop: positions(grad * x, n).sum(1)[:, start:stop], reads=x)]


def test_rules_for_functions_of_ones_own_take_no_generic_path() -> None:
    rule(swish)(rule_of_slope)
    rule(torch.ops.flatminima_tests.scaled.default)(rule_of_scale)
    model, x, y = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GenericPathWarning)
        xi = fm.gram(model, x, y)
    torch.testing.assert_close(xi, explicit_gram(model, x, y), rtol=1e-10, atol=0)


def test_without_their_rules_they_take_the_generic_path() -> None:
    model, x, y = network()
    with pytest.warns(GenericPathWarning, match=r"2 parameters \(slope, scale\)"):
        xi = fm.gram(model, x, y)
    torch.testing.assert_close(xi, explicit_gram(model, x, y), rtol=1e-10, atol=0)


def test_a_wrong_rule_gives_no_wrong_number() -> None:
    @rule(swish)
    def forgets_the_sigmoid(n: int, x: Tensor, slope: Tensor) -> list[ParameterUse]:
        return [ParameterUse(slope, lambda grad, start, stop: positions(grad * x, n).sum(1)[:, start:stop])]

    model, x, y = network()
    rule(torch.ops.flatminima_tests.scaled.default)(rule_of_scale)
    with pytest.warns(GenericPathWarning, match=r"layer rules gave for 1 parameters \(slope\) differs") as warned:
        xi = fm.gram(model, x, y)
    torch.testing.assert_close(xi, explicit_gram(model, x, y), rtol=1e-10, atol=0)
    assert len(warned) == 1  # and no second one that says that there is no rule


def plain(x: Tensor, slope: Tensor) -> Tensor:
    return x * slope


@pytest.mark.parametrize("register", [rule, extract, split])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (plain, "does not show calls of plain .*wrap_torch_function"),
        (scaled, r"CustomOpDef.*torch.ops.<namespace>.<name>.default"),
        (Swish.apply, "does not show calls of apply"),
        (nn.Linear, "does not show calls of Linear"),
        ("torch.add", "for a function itself.*got 'torch.add'"),
    ],
    ids=["plain function", "custom operator's definition", "custom function", "module", "name"],
)
def test_a_rule_that_would_never_be_used_is_refused(register: Any, function: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message) as raised:
        register(function)
    assert "\n" not in str(raised.value)


def test_the_last_rule_for_a_function_is_the_one_in_use() -> None:
    ours, calls = RULES[F.linear], 0

    @rule(F.linear)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return ours(*args, **kwargs)

    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    model = nn.Linear(4, 3).double()
    torch.testing.assert_close(fm.gram(model, x, y), explicit_gram(model, x, y), rtol=1e-10, atol=0)
    assert calls == 1


def test_a_split_shows_the_calls_inside_a_function() -> None:
    @wrap_torch_function(lambda x, weight: (x, weight))
    def projected(x: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, weight))

    class Projecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return projected(x, self.weight)

    model, x, y = Projecting().double(), torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    with pytest.warns(GenericPathWarning):
        fm.gram(model, x, y)
    split(projected)(lambda x, weight: torch.tanh(F.linear(x, weight)))
    torch.testing.assert_close(fm.gram(model, x, y), explicit_gram(model, x, y), rtol=1e-10, atol=0)


def test_temporary_rules_put_back_what_was_replaced_and_what_was_removed() -> None:
    before = [dict(table) for table in (RULES, EXTRACTS, SPLITS)]
    with temporary_rules():
        rule(F.linear, swish)(rule_of_slope)
        RULES.pop(F.conv2d)
        EXTRACTS.clear()
    assert before == [RULES, EXTRACTS, SPLITS]
