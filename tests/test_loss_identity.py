"""Two losses of one name are two in words, and one is the same wherever it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.losses import form_in_words


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def enclosing(value: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return plain(logits, targets) if value is not None else logits[:, 0]

    return loss


class Weighted:
    """A callable with a method that is a loss, too."""

    def __init__(self, factor: float, table: Tensor | None = None) -> None:
        self._factor, self.table = factor, table

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._factor * plain(logits, targets)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self(logits, targets)


class Tempered(nn.Module):
    """Learns its temperature."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(start))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return plain(logits / self.temperature, targets)


def table(entry: float) -> Tensor:
    return torch.zeros(2000).index_fill(0, torch.tensor([500]), entry)


DIFFERENT: dict[str, Callable[[float], Any]] = {
    "what a function encloses": enclosing,
    "what a namespace in it holds": lambda x: enclosing(SimpleNamespace(a=x)),
    "a tensor of many entries": lambda x: Weighted(1.0, table(x)),
    "a private attribute": Weighted,
    "what a method is bound to": lambda x: Weighted(x).loss,
    "an argument of a partial": lambda x: functools.partial(F.cross_entropy, reduction="none", label_smoothing=x),
    "a sparse tensor": lambda x: enclosing(table(x).to_sparse()),
}


@pytest.mark.parametrize("build", DIFFERENT.values(), ids=DIFFERENT)
def test_losses_that_differ_have_other_words(build: Callable[[float], Any]) -> None:
    assert form_in_words(build(0.1)) != form_in_words(build(0.2))
    assert form_in_words(build(0.1)) == form_in_words(build(0.1))


def test_the_mode_and_the_reduction_of_single_outputs_are_no_matter() -> None:
    module = Tempered()
    assert form_in_words(module.train()) == form_in_words(module.eval())
    assert form_in_words(nn.CrossEntropyLoss(reduction="none")) == form_in_words(nn.CrossEntropyLoss())


def test_sets_and_mappings_have_no_order() -> None:
    first, second = {0, 8}, {8, 0}
    assert list(first) != list(second)
    assert form_in_words(enclosing(first)) == form_in_words(enclosing(second))
    assert form_in_words(enclosing({"a": 1, "b": 2})) == form_in_words(enclosing({"b": 2, "a": 1}))


def test_what_a_loss_learns_counts_where_it_is_asked_for() -> None:
    one, other = Tempered(1.0), Tempered(2.0)
    assert form_in_words(one) == form_in_words(other)
    assert form_in_words(one, learned=True) != form_in_words(other, learned=True)


def test_a_network_that_a_loss_encloses_may_be_trained_meanwhile() -> None:
    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = form_in_words(enclosing(teacher))
    teacher(torch.randn(4, 2)).sum().backward()
    with torch.no_grad():
        teacher[0].weight.add_(1)
    assert form_in_words(enclosing(teacher)) == before


def test_what_is_enclosed_many_times_is_looked_at_once() -> None:
    loss: Any = plain
    for _ in range(40):  # 2^40 ways to the innermost
        loss = (lambda f, g: lambda logits, targets: f(logits, targets) + g(logits, targets))(loss, loss)
    assert form_in_words(loss) == form_in_words(loss)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    "build",
    [lambda: torch.empty(2, device="meta"), lambda: torch.eye(2).to_sparse_csr(), object, lambda: [object()]],
    ids=["meta", "sparse rows", "object", "list of objects"],
)
def test_what_cannot_be_looked_into_is_known_by_its_kind(build: Callable[[], Any]) -> None:
    assert form_in_words(enclosing(build())) == form_in_words(enclosing(build())) != form_in_words(enclosing(1))
