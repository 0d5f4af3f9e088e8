"""Models that keep what they compute from their parameters, and so cut these off from gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError, UnusedParametersWarning
from support.oracles import explicit_gram

N, D, K = 6, 4, 3
SHARPNESS = ("one_step_sharpness", "worst_case_sharpness", "average_sharpness", "hessian_trace")
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


def used(state: str) -> nn.Module:
    """A network that keeps biases, after passes in eval mode as they come before a measurement."""
    model = network(KeptUntilTrain)
    if state == "evaluated":
        with torch.no_grad():
            model.eval()(X)
    if state == "differentiated":
        nn.functional.cross_entropy(model.eval()(X), Y).backward()
    if state == "of other weights":
        with torch.no_grad():
            model.eval()(X)
            model[1].table += 1
    return model


@pytest.mark.filterwarnings("ignore::flatminima.errors.GenericPathWarning")
@pytest.mark.parametrize("state", ["new", "evaluated", "differentiated", "of other weights"])
@pytest.mark.parametrize("path", ["rules", "generic"])
def test_what_train_drops_is_computed_in_every_pass(state: str, path: Any) -> None:
    model, twin = used(state), network(Bias)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(fm.gram(model, X, Y, path=path), explicit_gram(twin, X, Y), rtol=1e-9, atol=1e-12)
    assert model[1].kept == {}


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
@pytest.mark.parametrize("state", ["new", "evaluated", "differentiated"])
def test_all_measures_see_it_computed_in_every_pass(state: str) -> None:
    """Also those that move the weights, or have them in a copy of float64."""
    model, twin = used(state).float(), network(Bias).float()
    data = (X.float(), Y)
    options: Any = {"subset_size": N, "trials": 2, "measures": (*SHARPNESS, "paper"), "progress": False}
    assert fm.measure(model, data, **options).estimates() == fm.measure(twin, data, **options).estimates()
    assert torch.equal(fm.exact_hessian(model, *data), fm.exact_hessian(twin, *data))


@pytest.mark.parametrize("inner", [ComputedByEval, KeptForever])
@pytest.mark.parametrize("path", ["rules", "generic"])
def test_parameters_that_eval_mode_cuts_off_are_warned_of(inner: type[nn.Module], path: Any) -> None:
    model = network(inner).eval()
    with torch.no_grad():
        model(X)
    with pytest.warns(UnusedParametersWarning, match=r"\(1\.table\) act on the logits in training mode"):
        fm.gram(model, X, Y, path=path)
    assert not model.training


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


def test_what_is_kept_with_its_graph_is_refused_by_its_name() -> None:
    with pytest.raises(FlatminimaError, match=r"the model keeps in 1\.kept what it computed from its parameters"):
        fm.gram(network(KeptForever), X, Y)
