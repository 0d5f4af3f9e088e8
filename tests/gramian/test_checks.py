"""What rows of J are held against, when, and what follows where they differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import GenericPathWarning, WrongGradientError
from flatminima.gramian import Checks, factored_gram
from flatminima.gramian.rules import RULES, ParameterUse, rule, temporary_rules
from support.cases import CASES, Case
from support.oracles import explicit_gram

X, Y = torch.randn(6, 5, 4, dtype=torch.float64), torch.arange(6) % 3


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.passes = nn.Linear(4, 5), nn.Linear(5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.head(torch.tanh(self.first(x)).mean(1))


def swapped_in_the_middle(n: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[ParameterUse]:
    """Rows of the right sizes, of which two are exchanged; those of the first and the last sample are right."""
    uses = RULES_OF_OURS(n, input, weight, bias) or []
    order = torch.tensor([0, 2, 1, *range(3, n)])

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return uses[0].rows(grad, start, stop)[order]

    return [ParameterUse(weight, rows, input), *uses[1:]]


RULES_OF_OURS = RULES[F.linear]


def test_two_samples_exchanged_are_noticed_and_put_right() -> None:
    model = Counted().double()
    with temporary_rules():
        rule(F.linear)(swapped_in_the_middle)
        with pytest.warns(GenericPathWarning, match=r"2 parameters \(first.weight, head.weight\) differs"):
            result = factored_gram(model, X, Y)
    torch.testing.assert_close(result.matrix(), explicit_gram(model, X, Y), rtol=1e-9, atol=0)
    assert result.generic_parameters == ("first.weight", "head.weight")


def test_what_was_wrong_once_is_not_believed_again() -> None:
    model, checks = Counted().double(), Checks()
    with temporary_rules():
        rule(F.linear)(swapped_in_the_middle)
        with pytest.warns(GenericPathWarning):
            factored_gram(model, X, Y, checks=checks)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GenericPathWarning)
            result = factored_gram(model, X, Y, checks=checks)
    assert checks.distrusted == {"first.weight", "head.weight"}
    torch.testing.assert_close(result.matrix(), explicit_gram(model, X, Y), rtol=1e-9, atol=0)


def test_the_same_calls_of_the_same_shapes_are_checked_once() -> None:
    model, checks = Counted().double(), Checks()
    passes = []
    for x in (X, X + 1, X[:, :3]):
        before = model.passes
        factored_gram(model, x, Y, checks=checks)
        passes.append(model.passes - before)
    assert passes[0] == passes[2] > passes[1] == 2  # one to plan, one to record


def test_guesses_are_checked_every_time() -> None:
    class Guessed(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cdist(x, x[:, :4]))  # not among the functions that are known

    model, checks = Guessed().double(), Checks()
    passes = []
    for x in (X, X + 1):
        before = model.passes
        factored_gram(model, x, Y, checks=checks)
        passes.append(model.passes - before)
    assert passes[0] == passes[1] > 2


OF_ALL_SORTS = ("reused block", "in place", "functional", "recurrent")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in OF_ALL_SORTS], ids=lambda case: case.name)
def test_the_generic_path_can_be_asked_for(case: Case) -> None:
    model, x, y = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GenericPathWarning)
        xi = fm.gram(model, x, y, path="generic")
    torch.testing.assert_close(xi, explicit_gram(model, x, y), rtol=1e-10, atol=1e-12 * xi.abs().max().item())
    assert set(factored_gram(model, x, y, path="generic").generic_parameters) == set(dict(model.named_parameters()))


class Interacting(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor], classes: int = 3) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.gru, self.head = nn.GRU(5, 5), nn.Linear(5, classes)
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self, torch.tanh(self.first(x)))


MIXING: dict[str, Callable[[], nn.Module]] = {
    "centred over the batch": lambda: Interacting(lambda net, h: net.head(h.mean(1) - h.mean((0, 1)))),
    "centred logits of two classes": lambda: Interacting(
        lambda net, h: (z := net.head(h.mean(1))) - z.mean(0), classes=2
    ),
    "a forgotten batch_first": lambda: Interacting(lambda net, h: net.head(net.gru(h)[0].mean(1))),
    "statistics of the batch behind weight norm": lambda: Interacting(
        lambda net, h: net.head(net.norm(h.transpose(1, 2)).mean(2))
    ),
    "attention over the batch": lambda: Interacting(
        lambda net, h: net.head((h.mean(1) @ h.mean(1).T).softmax(-1) @ h.mean(1))
    ),
    "a neighbour": lambda: Interacting(lambda net, h: net.head((h + h.roll(1, 0)).mean(1))),
}


@pytest.mark.parametrize("path", ["rules", "generic"])
@pytest.mark.parametrize("name", MIXING)
def test_samples_that_interact_are_refused(name: str, path: str) -> None:
    torch.manual_seed(0)
    model = MIXING[name]().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GenericPathWarning)
        with pytest.raises(WrongGradientError, match="interact"):
            factored_gram(model, X, Y % 2, path=path)


class AtAKink(nn.Module):
    """Of the last sample a unit's input is ``gap`` below zero in the batch, and as far above zero alone."""

    def __init__(self, gap: float, last: Tensor) -> None:
        super().__init__()
        self.gap, self.first, self.head = gap, nn.Linear(4, 5), nn.Linear(5, 3)
        with torch.no_grad():
            self.first.bias[0] -= self.first(last)[0]

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.tensor([self.gap if len(x) == 1 else -self.gap, 0, 0, 0, 0])
        return self.head(F.relu(self.first(x) + shift))


@pytest.mark.parametrize("path", ["rules", "generic"])
@pytest.mark.parametrize("gap", [2e-7, 1e-4])
def test_samples_at_a_kink_interact_only_if_more_than_rounding_moves_them(gap: float, path: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    model = AtAKink(gap, x[-1])
    if gap > 1e-6:
        with pytest.raises(WrongGradientError, match="samples interact"):
            factored_gram(model, x, Y, path=path)
    else:
        in_batch = AtAKink(-gap, x[-1])
        in_batch.load_state_dict(model.state_dict())
        found = factored_gram(model, x, Y, path=path).matrix()
        whole = explicit_gram(model, x, Y)
        assert not torch.allclose(whole, explicit_gram(in_batch, x, Y), rtol=1e-2)
        assert any(torch.allclose(found, one, rtol=1e-4) for one in (whole, explicit_gram(in_batch, x, Y)))


def test_random_outputs_in_eval_mode_are_refused() -> None:
    with pytest.raises(WrongGradientError, match="random in eval mode"):
        fm.gram(Interacting(lambda net, h: net.head(F.dropout(h.mean(1)))).double(), X, Y)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y, reduction="none") / len(z),
        lambda z, y: F.cross_entropy(z, y, reduction="none") / (y == 0).sum().clamp_min(1),
        lambda z, y: F.cross_entropy(z - z.mean(0), y, reduction="none"),
    ],
)
def test_a_loss_that_depends_on_its_batch_is_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(WrongGradientError, match="the loss gives a sample another value in another batch"):
        fm.gram(Counted().double(), X, Y, loss=loss)


def test_a_call_that_writes_a_parameter_through_out_gives_it_up() -> None:
    class Writing(Counted):
        def forward(self, x: Tensor) -> Tensor:
            doubled = torch.empty(3)
            with torch.no_grad():
                torch.mul(self.head.bias, 2, out=doubled)
            return super().forward(x) + doubled

    model = Writing().double()
    result = factored_gram(model, X, Y)
    torch.testing.assert_close(result.matrix(), explicit_gram(model, X, Y), rtol=1e-9, atol=0)
    assert result.generic_parameters == ("head.bias",)
