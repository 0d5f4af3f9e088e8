"""Measures of the weights alone: norms, spectral norms, distance from initialization."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError, UndefinedMeasureError
from flatminima.measures import CATALOGUE, Trial

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")

NAMES = ("parameter_norm", "distance_from_initialization", "log_spectral_product", "path_norm", "heavy_tail_alpha")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(12, 1, 4, 4, dtype=torch.float64), torch.arange(12) % 3


def measured(model: nn.Module, *names: Any, **options: Any) -> fm.Characterization:
    return fm.measure(model, data(), subset_size=4, trials=2, measures=names, progress=False, **options)


def test_the_parameter_norm_is_that_of_all_trainable_parameters() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    expected = sum(p.square().sum().item() for p in model.parameters() if p.requires_grad)
    assert measured(model, "parameter_norm").others["parameter_norm"].mean == pytest.approx(expected, rel=1e-14)


def test_the_distance_from_initialization_is_that_of_the_trainable_parameters() -> None:
    model, before = network(), network(1).float().state_dict()
    expected = sum((p - before[name].double()).square().sum().item() for name, p in model.named_parameters())
    c = measured(model, "distance_from_initialization", initial=before)
    assert c.others["distance_from_initialization"].mean == pytest.approx(expected, rel=1e-14)
    at_start = measured(model, "distance_from_initialization", initial=model.state_dict())
    assert at_start.others["distance_from_initialization"].mean == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("4.bias"), r"no parameter '4.bias'.*pass the state_dict of this very model"),
        (lambda state: state.update({"4.bias": torch.zeros(2)}), r"'4.bias' has the shape \(3,\), but \(2,\)"),
        (lambda state: state["4.bias"].fill_(math.nan), r"NaN or infinity in parameter '4.bias' of initial="),
    ],
)
def test_weights_of_another_model_are_refused_in_a_line(change: Any, message: str) -> None:
    before = network(1).state_dict()
    change(before)
    with pytest.raises(FlatminimaError, match=message) as error:
        measured(network(), "weights", initial=before)
    assert "\n" not in str(error.value)


def test_without_initial_weights_there_is_no_distance_and_the_result_says_what_to_pass() -> None:
    with pytest.raises(UndefinedMeasureError, match="pass initial=state_dict"):
        measured(network(), "distance_from_initialization")
    assert "pass initial=" in measured(network(), "weights").settings.left_out["distance_from_initialization"]


def test_the_product_of_spectral_norms_is_that_of_kernels_as_matrices() -> None:
    model = network()
    kernels = [model[0].weight.detach().numpy().reshape(4, 9), model[4].weight.detach().numpy()]
    expected = sum(math.log(np.linalg.eigvalsh(kernel @ kernel.T)[-1]) for kernel in kernels)
    found = measured(model, "log_spectral_product").others["log_spectral_product"].mean
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_spectral_norm_of_zero_is_no_silent_infinity() -> None:
    model = network()
    nn.init.zeros_(model[0].weight)
    with pytest.raises(UndefinedMeasureError, match=r"'0\.weight' is all zero"):
        measured(model, "log_spectral_product")


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("measure", ["log_spectral_product", "heavy_tail_alpha"])
def test_spectra_of_weights_that_are_no_parameters_are_undefined(norm: Any, measure: str) -> None:
    model = network()
    model[4] = norm(model[4])
    with pytest.raises(UndefinedMeasureError, match="weight of '4' is no parameter"):
        measured(model, measure)


def test_measures_of_the_weights_alone_are_taken_once_and_have_no_error() -> None:
    calls = []

    def first_weight(trial: Trial) -> float:
        calls.append(trial.number)
        return next(trial.model.parameters()).flatten()[0].item()

    own = fm.measures.Measure("first_weight", first_weight, "first weight", cost="weights")
    c = measured(network(), "weights", own, initial=network(1).state_dict())
    assert calls == [0]
    for name in (*NAMES[:4], "first_weight"):
        values = c.others[name]
        assert values.per_trial[0] == values.per_trial[1]
        assert values.standard_error == 0
    assert {name for name in CATALOGUE if CATALOGUE[name].cost == "weights"} == set(NAMES)


def test_models_that_are_compared_have_their_own() -> None:
    models = {"a": network(), "b": network(1)}
    both = fm.compare(models, data(), subset_size=4, trials=2, measures="parameter_norm", progress=False)
    for name, model in models.items():
        expected = measured(model, "parameter_norm").others["parameter_norm"]
        assert both.characterizations[name].others["parameter_norm"] == expected


def compared(models: dict[str, nn.Module], initial: Any) -> fm.Comparison:
    how = {"subset_size": 4, "trials": 2, "measures": "distance_from_initialization", "progress": False}
    return fm.compare(models, data(), initial=initial, **how)


def test_models_from_different_initial_weights_are_compared_by_their_own() -> None:
    models = {"a": network(1), "b": network(2)}
    initial = {"a": network(3).state_dict(), "b": network(4).state_dict()}
    expected = {
        name: sum((p - initial[name][key]).square().sum().item() for key, p in model.named_parameters())
        for name, model in models.items()
    }
    comparison = compared(models, initial)
    for name, value in expected.items():
        found = comparison[name].others["distance_from_initialization"].mean
        assert found == pytest.approx(value, rel=1e-14)
    common = compared(models, initial["a"])
    assert common["a"] == comparison["a"]
    assert common["b"] != comparison["b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "initial= has no weights of 'b': pass one state_dict for every model"),
        (["a", "b", "bb"], r"initial= has weights of 'bb'.*none of the models"),
    ],
)
def test_initial_weights_are_those_of_the_models(names: list[str], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        compared({"a": network(1), "b": network(2)}, {name: network(3).state_dict() for name in names})


def test_a_single_model_has_one_state_dict() -> None:
    with pytest.raises(FlatminimaError, match=r"initial= has weights of 'a', which is none of the models"):
        measured(network(), "distance_from_initialization", initial={"a": network(1).state_dict()})
