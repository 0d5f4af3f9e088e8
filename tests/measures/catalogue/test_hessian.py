from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import UndefinedMeasureError
from flatminima.measures import CATALOGUE, Measure, Trial
from flatminima.network import sound_batchnorm
from support.once_differentiable import DifferentiableOnce
from support.small_networks import pinned_linear
from support.trials import trial_of

pytest.importorskip("curvlinops")
pytestmark = [
    pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning"),
    pytest.mark.xdist_group("curvlinops"),
]

TOP, TRACE = CATALOGUE["hessian_top_eigenvalue"], CATALOGUE["hessian_trace"]


def exact(trial: Trial) -> tuple[float, float]:
    hessian = fm.exact_hessian(trial.model, trial.inputs, trial.targets)
    return torch.linalg.eigvalsh(hessian)[-1].item(), hessian.trace().item()


def wide(samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """42 weights, and a Hessian of at most that many times one class's rank."""
    torch.manual_seed(0)
    return nn.Linear(20, 2).double(), torch.randn(samples, 20, dtype=torch.float64), torch.arange(samples) % 2


def small() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = pinned_linear(12)
    return model, x, torch.arange(12) % 3


def convolutional() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    model = nn.Sequential(*layers).double()
    model[1].weight.requires_grad_(False)
    return model, torch.randn(9, 1, 4, 4, dtype=torch.float64), torch.arange(9) % 3


class Tied(nn.Module):
    """One weight in two places, inputs by name, attention, and a layer normalization.

    Forward over ``torch.func.jacrev``, PyTorch 2.13 gives a wrong derivative by the last one's scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        x = self.norm(self.second(self.first(tokens).tanh()))
        return self.head(F.scaled_dot_product_attention(x, x, x).mean(1) * scale[:, None])


def tied() -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    inputs = {"tokens": torch.randn(9, 2, 4, dtype=torch.float64), "scale": torch.rand(9, dtype=torch.float64)}
    return Tied().double(), inputs, torch.arange(9) % 3


@pytest.mark.parametrize(("case", "at_once"), [(small, sys.maxsize), (convolutional, 6), (tied, sys.maxsize)])
def test_the_top_eigenvalue_is_that_of_the_exact_hessian(case: Any, at_once: int) -> None:
    model, x, y = case()
    trial = trial_of(model, *(x if isinstance(x, tuple) else (x,)), y, subset_size=5)
    trial = dataclasses.replace(trial, samples_at_once=at_once)  # 6: two at once, and the fifth alone
    with sound_batchnorm():
        found = TOP.of(trial)
    assert found == pytest.approx(exact(trial)[0], rel=1e-7)


def test_the_trace_of_few_parameters_is_exact() -> None:
    trial = trial_of(*small(), subset_size=5)
    assert TRACE.of(trial) == pytest.approx(exact(trial)[1], rel=1e-12)


def test_sparse_gradients_of_an_embedding_are_as_dense_ones() -> None:
    def trace(*, sparse: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)).double()
        return TRACE.of(trial_of(model, torch.arange(16).view(8, 2) % 5, torch.arange(8) % 3, subset_size=4))

    assert trace(sparse=True) == trace(sparse=False)


def test_the_trace_of_low_rank_is_exact() -> None:
    trial = trial_of(*wide(6))
    assert TRACE.of(trial) == pytest.approx(exact(trial)[1], rel=1e-9)


def test_the_trace_is_right_on_average() -> None:
    """Of full rank: within four standard errors, which are a small part of it."""
    trial = trial_of(*convolutional(), subset_size=5)
    expected = exact(trial)[1]
    errors = torch.tensor([TRACE.of(dataclasses.replace(trial, number=i)) - expected for i in range(16)])
    standard_error = errors.std().item() / 4
    assert 0 < standard_error < 0.3 * expected
    assert abs(errors.mean().item()) < 4 * standard_error


def test_draws_are_the_trials_own_and_the_callers_generator_stays() -> None:
    trial = trial_of(*convolutional(), subset_size=5)
    state = torch.get_rng_state()
    values = [measure.of(trial) for measure in (TRACE, TOP)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert [measure.of(trial) for measure in (TRACE, TOP)] == values


def test_float32_agrees_with_float64_where_the_loss_is_tiny() -> None:
    torch.manual_seed(0)
    y = torch.arange(6) % 3
    model, x = nn.Linear(11, 3).double(), F.one_hot(y, 11).double() + 0.1 * torch.randn(6, 11, dtype=torch.float64)
    model.weight.data = 32 * torch.eye(3, 11, dtype=torch.float64)
    for measure in (TOP, TRACE):
        expected = measure.of(trial_of(model, x, y))
        assert 0 < expected < 1e-9
        found = measure.of(trial_of(copy.deepcopy(model).float(), x.float(), y))
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", ["cross_entropy", lambda z, y: z.gather(1, y[:, None])[:, 0]], ids=["", "linear"])
@pytest.mark.parametrize("measure", [TOP, TRACE])
def test_a_network_without_a_second_derivative_has_none(measure: Measure, loss: Any) -> None:
    """Also where autograd itself would say nothing, and give zeros: the loss's own gradient is constant."""
    torch.manual_seed(0)
    trial = trial_of(DifferentiableOnce(5, 3), torch.randn(6, 5), torch.arange(6) % 3, subset_size=3, loss=loss)
    with pytest.raises(UndefinedMeasureError, match=r"no second derivative: .*once_differentiable"):
        measure.of(trial)


class HalfWrong(torch.autograd.Function):
    """x · s, whose derivative by x forgets that it depends on s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, s = ctx.saved_tensors
        return gradient * s.detach(), gradient * x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(5, 4), nn.Parameter(torch.rand(6, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(HalfWrong.apply(self.first(x), self.scale[0]).tanh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measure", [TOP, TRACE])
def test_a_wrong_second_derivative_is_found_by_asymmetry(measure: Measure, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    trial = trial_of(Scaled().to(dtype), torch.randn(6, 5, dtype=dtype), torch.arange(6) % 3, subset_size=3)
    with pytest.raises(UndefinedMeasureError, match=r"not symmetric \(by "):
        measure.of(trial)


def test_the_generators_of_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` seeds them all, and only the CPU's is restored."""
    trial = trial_of(*wide(6), subset_size=4)
    monkeypatch.setattr(torch, "manual_seed", None)
    before = torch.get_rng_state()
    TRACE.of(trial)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_curvlinops_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    model, x, y = wide(6)
    with pytest.raises(UndefinedMeasureError, match=r"pip install 'flatminima\[curvature\]'") as error:
        fm.measure(model, (x, y), subset_size=4, trials=1, measures="hessian_trace", progress=False)
    assert "\n" not in str(error.value)
