"""The loss around a minimum, against evaluations of copies whose weights are moved by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Landscape, landscape
from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.measures import evaluate
from flatminima.network import samples_of
from support.landscapes import direction_of, mean_loss, moved_by_hand, network

STEPS = 5


def test_losses_along_a_line_are_those_of_moved_copies(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    direction = direction_of(model, data, seed=3)
    found = landscape(model, data, steps=STEPS, extent=2.0, seed=3, progress=False)
    assert found.coordinates == ((-2.0, -1.0, 0.0, 1.0, 2.0),)
    expected = [mean_loss(moved_by_hand(model, direction, step), data) for step in found.coordinates[0]]
    assert found.losses == pytest.approx(expected, rel=1e-12)
    assert found.losses[2] == mean_loss(model, data)


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(7, 7).double()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return labels.roll(1, dims=1)

    def forward(self, tokens: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.token(decoder_input_ids) + self.token(tokens).mean(1, keepdim=True)


def test_a_decoder_is_fed_its_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(7, (6, 5), generator=generator) for _ in range(2))
    data = [{"tokens": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    torch.manual_seed(0)
    model = _Decoder()
    found = landscape(model, data, steps=3, progress=False)
    logits = model(tokens, labels.roll(1, dims=1))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert found.losses[1] == pytest.approx(expected, rel=1e-12)


def test_accuracies_stand_beside_the_losses(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    found = landscape(model, data, steps=3, progress=False)
    assert found.accuracies[1] == evaluate(model, samples_of(data)).accuracy
    assert (
        landscape(model, (data[0], data[1].double()), loss=lambda z, y: (z.sum(1) - y) ** 2, steps=3).accuracies == ()
    )


def test_the_model_is_left_to_the_bit(data: tuple[Tensor, Tensor]) -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    landscape(model, data, steps=3, progress=False)
    landscape(model, data, directions="between", to=network(1), steps=5, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_where_the_loss_is_not_finite_it_is_nan(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    found = landscape(model, data, steps=3, extent=1e200, progress=False)
    assert [math.isnan(loss) for loss in found.losses] == [True, False, True]
    again = Landscape.from_json(found.to_json())
    assert again.losses[1] == found.losses[1]
    assert math.isnan(again.losses[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "hills"}, "directions"),
        ({"directions": "between"}, "needs to="),
        ({"to": nn.Linear(2, 3)}, "'between' alone"),
        ({"directions": "between", "to": nn.Linear(2, 3)}, r"do not fit the model: 0.weight"),
        ({"dimensions": 3}, "dimensions must be 1 or 2"),
        ({"steps": 4}, "steps must be odd"),
        ({"steps": 1}, "steps must be odd"),
        ({"directions": "between", "to": nn.Linear(2, 3), "steps": 7}, r"steps must be 5, 9, 13"),
        ({"extent": 0.0}, "extent must be a positive number"),
        ({"extent": 10**400}, "extent must be a positive number"),
        ({"extent": math.nan}, "extent must be a positive number, got nan"),
        ({"directions": "between", "to": nn.Linear(2, 3), "extent": 2.0}, r"extent has no meaning for .*leave it out"),
        ({"directions": "between", "to": nn.Linear(2, 3), "dimensions": 2}, r"through two other models: to=\[a, b\]"),
        ({"directions": None}, "unknown directions None; use one of random, hessian, between"),
        ({"directions": "randm"}, r"unknown directions 'randm' \(did you mean 'random'\?\)"),
        ({"dimensions": 1.0}, "dimensions must be an integer, got 1.0"),
        ({"steps": "5"}, "steps must be an integer, got '5'"),
        ({"steps": 10**9 + 1}, r"a grid of 1,000,000,001 points .*lower steps"),
        ({"steps": 1001, "dimensions": 2}, r"a grid of 1,002,001 points"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"progress": "no"}, "progress must be True or False"),
        ({"path": 3}, "path must name a file, got 3"),
        ({"path": ""}, "path must name a file, got ''"),
        ({"directions": "between", "to": None}, "to must be models or their state_dicts, got NoneType"),
        ({"directions": "between", "to": "other.pt"}, "got str: load the weights first"),
        ({"directions": "between", "to": ["other.pt"]}, "got str: load the weights first"),
    ],
)
def test_wrong_arguments_are_refused(data: tuple[Tensor, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        landscape(network(), data, **({"progress": False} | options))


class _Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("model.pt", "a model is a torch.nn.Module, got str"),
        (nn.Linear, "a model is a torch.nn.Module, got type"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "'1.weight' has no shape yet .*run the model on one batch"),
        (nn.Linear(32, 3, device="meta"), "'weight' is on the meta device, without values: load"),
        (nn.Linear(32, 3, dtype=torch.complex64), "weight is torch.complex64: complex weights are not moved"),
        (nn.Flatten(), "no trainable weights of two or more dimensions to move: set requires_grad"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(32, 3).double()).requires_grad_(False),
            r"set requires_grad .*or use directions='between'",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(32, 3).double(), _Noise()), "random in eval mode"),
        (nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), "float64.*convert the inputs to the parameters' type"),
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 3).double()), "pass the data as the model takes them"),
    ],
)
def test_models_without_a_landscape_are_refused(data: tuple[Tensor, Tensor], model: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message) as raised:
        landscape(model, data, progress=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("steps", [3, 7, 99])
def test_the_minimum_is_a_grid_point_to_the_bit(data: tuple[Tensor, Tensor], steps: int) -> None:
    (axis,) = landscape(network(), data, extent=0.3, steps=steps, progress=False).coordinates
    assert (axis[0], axis[steps // 2], axis[-1]) == (-0.3, 0.0, 0.3)


def test_a_network_with_nan_is_refused(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    with torch.no_grad():
        model[4].bias.fill_(math.nan)  # type: ignore[index]
    with pytest.raises(NonFiniteError):
        landscape(model, data, progress=False)
