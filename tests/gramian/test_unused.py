"""Models that keep what they compute from their parameters, and so cut these off from gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError, GenericPathWarning, UnusedParametersWarning

N, D, K = 6, 4, 3
X, Y = torch.randn(N, D, dtype=torch.float64), torch.arange(N) % K


class Bias(nn.Module):
    """A table of biases and which of them each feature has, as attention has them by relative position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3))
        self.indices = torch.tensor([0, 1, 1, 2])

    def biases(self) -> Tensor:
        return self.table[self.indices]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.biases()


class KeptUntilTrain(Bias):
    """In eval mode kept from the first pass on, until ``train`` drops it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> KeptUntilTrain:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def biases(self) -> Tensor:
        if self.training:
            return super().biases()
        if "cpu" not in self.kept:
            self.kept["cpu"] = super().biases()
        return self.kept["cpu"]


class ComputedByEval(Bias):
    """Computed where eval mode begins, without gradients."""

    @torch.no_grad()
    def train(self, mode: bool = True) -> ComputedByEval:
        super().train(mode)
        self.kept = None if mode else super().biases()
        return self

    def biases(self) -> Tensor:
        return super().biases() if self.training else self.kept


class KeptForever(Bias):
    """Kept from the first pass in eval mode on."""

    kept: Tensor | None = None

    def biases(self) -> Tensor:
        if self.training:
            return super().biases()
        if self.kept is None:
            self.kept = super().biases()
        return self.kept


def network(inner: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), inner(), nn.Tanh(), nn.BatchNorm1d(D), nn.Linear(D, K)).double()


@pytest.mark.parametrize("inner", [KeptUntilTrain, ComputedByEval, KeptForever])
@pytest.mark.parametrize("path", ["rules", "generic"])
def test_parameters_that_eval_mode_cuts_off_are_warned_of(inner: type[nn.Module], path: Any) -> None:
    model = network(inner)
    with torch.no_grad():
        model.eval()(X)
    with pytest.warns(UnusedParametersWarning, match=r"\(1\.table\) act on the logits"):
        fm.gram(model, X, Y, path=path)
    assert not model.training


@pytest.mark.filterwarnings("ignore::flatminima.errors.GenericPathWarning")
def test_what_the_measurement_itself_has_let_the_model_keep_is_warned_of() -> None:
    with pytest.warns(UnusedParametersWarning, match=r"\(1\.table\)"):
        fm.gram(network(KeptUntilTrain).train(), X, Y)


def test_the_warning_comes_once_and_with_batch_statistics_too() -> None:
    model = network(ComputedByEval).float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fm.measure(model, (X.float(), Y), subset_size=N, trials=3, batchnorm=3, progress=False)
    assert sum(issubclass(w.category, UnusedParametersWarning) for w in caught) == 1


@pytest.mark.filterwarnings("error::flatminima.errors.UnusedParametersWarning")
@pytest.mark.filterwarnings("ignore::flatminima.errors.GenericPathWarning")
def test_frozen_unused_and_dead_parameters_are_not_warned_of() -> None:
    frozen = network(ComputedByEval)
    frozen[1].table.requires_grad_(False)
    unused = network(Bias)
    unused[0].register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    dead = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Dropout(), nn.Linear(D, K)).double()
    nn.init.constant_(dead[0].bias, -100)
    for model in (frozen, unused, dead):
        fm.gram(model, X, Y)


@pytest.mark.parametrize("path", ["rules", "generic"])
def test_what_is_kept_with_its_graph_is_refused_by_its_name(path: Any) -> None:
    model = network(KeptForever).eval()
    nn.functional.cross_entropy(model(X), Y).backward()
    with pytest.raises(FlatminimaError, match=r"the model keeps in 1\.kept what it computed from its parameters"):
        fm.gram(model, X, Y, path=path)


def test_exact_forms_warn_too() -> None:
    with pytest.warns(UnusedParametersWarning, match=r"\(1\.table\)"):
        fm.exact_hessian(network(KeptUntilTrain), X, Y)


class Picky(nn.Module):
    """With a parameter that nothing uses, and a pass in training mode that fails or has effects."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(2))
        self.passes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes.append(x)
            self.spare = nn.Parameter(torch.zeros(2))
            raise AssertionError
        return x


def test_a_pass_in_training_mode_leaves_the_model_alone() -> None:
    model = network(Picky)
    spare = model[1].spare
    state = torch.get_rng_state()
    fm.gram(model, X, Y)
    assert model[1].spare is spare
    assert model[1].passes == []
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("error::flatminima.errors.UnusedParametersWarning")
def test_experts_that_dropout_would_choose_are_not_warned_of() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
            self.dropout = nn.Dropout(0.9)

        def forward(self, x: Tensor) -> Tensor:
            chosen = self.dropout(torch.ones_like(x)).argmax(1)
            return torch.stack([self.experts[i](row) for i, row in zip(chosen, x, strict=True)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GenericPathWarning)
        fm.gram(network(Experts), X, Y)
