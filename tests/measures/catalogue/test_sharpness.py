from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.measures import CATALOGUE
from flatminima.measures.catalogue.sharpness import RADIUS, worst_case_rise
from support.interruptions import what_interruptions_leave
from support.trials import trial_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")

NAMES = ("one_step_sharpness", "worst_case_sharpness")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 3


def logistic() -> tuple[nn.Module, Tensor, Tensor]:
    """Eight weights: the loss is convex, so its worst case in a box is in one of 256 corners."""
    torch.manual_seed(2)
    model = nn.Linear(4, 2, bias=False).double()
    return model, torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 2


def loss_with(model: nn.Module, trial: Any, shift: Tensor) -> float:
    """The mean loss at weights that are moved, of a copy."""
    other = copy.deepcopy(model)
    vector = nn.utils.parameters_to_vector(other.parameters())
    nn.utils.vector_to_parameters(vector.detach() + shift, other.parameters())
    return F.cross_entropy(other(trial.inputs), trial.targets).item()


@pytest.mark.parametrize("at_once", [3, 10])
def test_one_step_goes_to_the_corner_that_the_gradient_points_at(at_once: int) -> None:
    model = network()
    trial = trial_of(model, *data())
    trial = dataclasses.replace(trial, samples_at_once=at_once)
    loss = F.cross_entropy(model(trial.inputs), trial.targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    expected = loss_with(model, trial, 0.002 * weights.abs() * gradient.sign()) - loss.item()
    assert CATALOGUE["one_step_sharpness"].of(trial) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("radius", [RADIUS, 0.5, 1.0])
def test_the_worst_case_of_a_convex_loss_is_its_largest_corner(radius: float) -> None:
    model, x, y = logistic()
    trial = trial_of(model, x, y, subset_size=4)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().abs()
    corners = [torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1, 1), repeat=8)]
    start = loss_with(model, trial, torch.zeros(8, dtype=torch.float64))
    expected = max(loss_with(model, trial, radius * weights * corner) for corner in corners) - start
    assert worst_case_rise(trial, radius, 20) == pytest.approx(expected, rel=1e-9)


def test_the_worst_case_is_within_the_box_and_no_less_than_one_step() -> None:
    """Where the loss bends within the box: a network, and weights that may change their signs."""
    model = network()
    trial = trial_of(model, *data())
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    seen: list[Tensor] = []

    def look(module: nn.Module, inputs: Any) -> None:
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    model.register_forward_pre_hook(look)
    found = [worst_case_rise(trial, 2.0, steps) for steps in (1, 20)]
    assert found[1] > 1.1 * found[0] > 0
    assert len(seen) == 2 + 21
    shifts = torch.stack(seen) - weights
    assert (shifts.abs() <= 2.0 * weights.abs() * (1 + 1e-12)).all()
    assert len(shifts.unique(dim=0)) > 15
    worst = max(loss_with(model, trial, shift) for shift in shifts)
    assert found[1] == pytest.approx(worst - F.cross_entropy(model(trial.inputs), trial.targets).item(), rel=1e-9)


def test_it_does_not_change_where_layers_are_rescaled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    scaled = copy.deepcopy(model)
    for parameter, factor in zip(scaled.parameters(), (8, 8, 1 / 8, 1), strict=True):
        parameter.data *= factor
    for name in NAMES:
        first, second = (CATALOGUE[name].of(trial_of(m, *data())) for m in (model, scaled))
        assert first == pytest.approx(second, rel=1e-9)
        assert first > 0


def test_float32_agrees_with_float64_where_the_loss_is_tiny() -> None:
    torch.manual_seed(0)
    y = torch.arange(6) % 3
    model, x = nn.Linear(8, 3).double(), F.one_hot(y, 8).double() + 0.1 * torch.randn(6, 8, dtype=torch.float64)
    model.weight.data = 26 * torch.eye(3, 8, dtype=torch.float64) + 0.1 * torch.randn(3, 8, dtype=torch.float64)
    for name in NAMES:
        expected = CATALOGUE[name].of(trial_of(model, x, y))
        assert 0 < expected < 1e-9
        found = CATALOGUE[name].of(trial_of(copy.deepcopy(model).float(), x.float(), y))
        assert found == pytest.approx(expected, rel=1e-2)


def test_weights_come_back_to_the_bit() -> None:
    model = network().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = data()
    c = fm.measure(model, (x.float(), y), subset_size=5, trials=2, measures=NAMES, progress=False)
    assert c.others[NAMES[1]].mean >= c.others[NAMES[0]].mean > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [*NAMES, "pac_bayes_sigma"])
def test_weights_come_back_to_the_bit_from_an_interruption_too(name: str) -> None:
    model, (x, y) = network(), data()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    moved = []

    def interrupt(module: nn.Module, inputs: Any) -> None:
        moved.append(not torch.equal(nn.utils.parameters_to_vector(model.parameters()), before))
        if sum(moved) == 1:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fm.measure(model, (x, y), subset_size=5, trials=1, measures=name, progress=False)
    assert moved[-1]
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


def test_interrupted_at_any_line_it_leaves_nothing_behind() -> None:
    model, (x, y) = network(), data()

    def call() -> None:
        fm.measure(model, (x, y), subset_size=4, trials=1, measures=NAMES[0], progress=False)

    left = what_interruptions_leave(call, model, moments=5, seed=7)
    assert not left, "\n".join(left)
