from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.errors import UndefinedMeasureError
from flatminima.measures import CATALOGUE
from support.trials import trial_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")


def path_norm(model: nn.Module, *shape: int) -> float:
    torch.manual_seed(3)
    x = torch.randn(4, *shape, dtype=torch.float64)
    trial = trial_of(model.double(), x, torch.arange(4) % 2, subset_size=2)
    before = copy.deepcopy(model.state_dict())
    value = CATALOGUE["path_norm"].of(trial)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return value


def scrambled(model: nn.Module) -> nn.Module:
    """With statistics and scales as after training."""
    torch.manual_seed(4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias), nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def test_it_is_the_sum_over_all_paths() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    found = path_norm(model, 3)
    first, second, third = (model[i].weight.detach() for i in (0, 2, 4))
    a, b, c = (model[i].bias.detach() for i in (0, 2, 4))
    paths = [first[j, i] * second[k, j] * third[m, k] for i, j, k, m in itertools.product(*map(range, (3, 4, 5, 2)))]
    paths += [a[j] * second[k, j] * third[m, k] for j, k, m in itertools.product(*map(range, (4, 5, 2)))]
    paths += [b[k] * third[m, k] for k, m in itertools.product(range(5), range(2))]
    paths += list(c)
    assert found == pytest.approx(math.fsum(float(path) ** 2 for path in paths), rel=1e-12)


def test_it_is_what_folded_and_squared_weights_give_for_ones() -> None:
    torch.manual_seed(0)
    pool = nn.MaxPool2d(2), nn.Conv2d(4, 3, 2, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *pool, nn.Linear(3, 2)
    model = scrambled(nn.Sequential(*layers)).double().eval()
    nn.init.ones_(model[4].bias)  # lest the last units are dead, and ξ singular
    norm = model[1]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    folded = copy.deepcopy(model)
    folded[0] = nn.Conv2d(2, 4, 3, padding=1).double()
    folded[0].weight.data = model[0].weight.detach() * scale[:, None, None, None]
    folded[0].bias.data = norm.bias.detach() - scale * norm.running_mean
    folded[1] = nn.Identity()
    for parameter in folded.parameters():
        parameter.data = parameter.data.square()
    expected = folded(torch.ones(1, 2, 8, 8, dtype=torch.float64)).sum().item()
    assert path_norm(model, 2, 8, 8) == pytest.approx(expected, rel=1e-12)


class Residual(nn.Module):
    """Two branches, one of them without a weight; joined, padded with zeros, and summed over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.relu(self.conv(x))
        x = torch.cat([x, x[:, :1]], 1)
        x = F.pad(x, (0, 0, 0, 0, 0, 3))
        return self.head(F.dropout(x, training=False).sum((2, 3)).view(x.shape[0], -1))


def test_branches_add_their_paths() -> None:
    torch.manual_seed(0)
    model = Residual()
    found = path_norm(model, 2, 1, 1)
    kernel, head = model.conv.weight.detach()[:, :, 1, 1].square(), model.head.weight.detach().square().sum(0)
    ways = torch.eye(2) + kernel  # to every channel from every input
    expected = (head[0] + head[2]) * ways[0].sum() + head[1] * ways[1].sum()
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_large_ones_do_not_overflow_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    once = path_norm(model, 3)
    large = copy.deepcopy(model).float()
    large[2].weight.data.mul_(1e15), large[2].bias.data.mul_(1e15)
    x = torch.randn(4, 3)
    trial = trial_of(large, x, torch.arange(4) % 2, subset_size=2, loss=lambda z, y: (1e-15 * z).square().sum(1))
    assert CATALOGUE["path_norm"].of(trial) == pytest.approx(1e30 * once, rel=1e-6)


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.head, self.function = nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.head)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", lambda x, head: head(x.tanh())),
        ("gelu", lambda x, head: head(F.gelu(x))),
        ("layer_norm", lambda x, head: head(F.layer_norm(x, (3,)))),
        ("scaled_dot_product_attention", lambda x, head: head(F.scaled_dot_product_attention(*3 * [x[:, None]])[:, 0])),
        ("mul", lambda x, head: head(2 * x)),
        ("add", lambda x, head: head(x + 1)),
        ("add", lambda x, head: F.linear(x, head.weight) + head.bias),
        ("pad", lambda x, head: head(F.pad(x[:, :2], (0, 1), value=1.0))),
        ("matmul", lambda x, head: x @ head.weight.T),
    ],
)
def test_networks_of_anything_else_have_none(name: str, function: Callable[[Tensor, nn.Linear], Tensor]) -> None:
    torch.manual_seed(0)
    with pytest.raises(UndefinedMeasureError, match=f"the network calls .*{name}"):
        path_norm(Calls(function), 3)


def test_weights_in_float32_outside_of_layers_have_none() -> None:
    torch.manual_seed(0)
    trial = trial_of(Calls(lambda x, head: x @ head.weight.T), torch.randn(4, 3), torch.arange(4) % 2, subset_size=2)
    with pytest.raises(UndefinedMeasureError, match=r"cannot be run on ones in float64: .*dtype"):
        CATALOGUE["path_norm"].of(trial)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_a_part_in_torchscript_whose_weights_are_not_seen_has_none() -> None:
    torch.manual_seed(0)
    with pytest.raises(UndefinedMeasureError, match="TorchScript's in part, which hides what it calls"):
        path_norm(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), torch.jit.script(nn.Linear(4, 2).double())), 3)


def test_a_compiled_part_has_its_own() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = copy.deepcopy(plain).double()
    compiled[0] = torch.compile(compiled[0], backend="eager")
    compiled(torch.randn(4, 3, dtype=torch.float64))  # once compiled
    assert path_norm(compiled, 3) == path_norm(plain, 3)


def test_a_batchnorm_without_statistics_has_no_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
    x = torch.randn(4, 3)
    trial = trial_of(nn.Linear(3, 2), x, torch.arange(4) % 2, subset_size=2)
    trial = dataclasses.replace(trial, model=model)
    with pytest.raises(UndefinedMeasureError, match="without running statistics"):
        CATALOGUE["path_norm"].of(trial)


def test_inputs_that_are_no_numbers_have_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 2))
    trial = trial_of(model, torch.randint(0, 9, (4, 2)), torch.arange(4) % 2, subset_size=2)
    with pytest.raises(UndefinedMeasureError, match="not one floating-point tensor"):
        CATALOGUE["path_norm"].of(trial)
