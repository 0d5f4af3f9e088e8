from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.lab.runs.sam import SharpnessAwareGradient
from flatminima.network.batches import run_model
from support.regularizer_cases import (
    Case,
    assert_goes_back_outside_autocast,
    assert_same_bits,
    assert_same_gradients,
    by_case,
    gradients_of,
    make,
    snapshot,
)

BOTH = pytest.mark.parametrize(("rho", "adaptive"), [(0.05, False), (0.5, True)], ids=["sam", "asam"])


@BOTH
@by_case
def test_the_gradient_is_that_of_the_definition(case: Case, rho: float, adaptive: bool) -> None:
    """Every awkward model, against the definition written out with plain autograd."""
    model, inputs, targets = make(case)
    expected, moved = copy.deepcopy(model), copy.deepcopy(model)
    here = case.loss_fn(run_model(expected, inputs), targets)
    here.backward()
    factors = {n: p.detach().abs() if adaptive else torch.ones_like(p) for n, p in expected.named_parameters()}
    gradients = {n: g.to_dense() for n, g in gradients_of(expected).items() if g is not None}
    norm = sum((factors[n] * g).square().sum() for n, g in gradients.items()) ** 0.5
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in gradients:
                parameter += rho * factors[name] ** 2 * gradients[name] / norm
    case.loss_fn(run_model(moved, inputs), targets).backward()

    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = SharpnessAwareGradient(model, rho=rho, adaptive=adaptive).backward(case.loss_fn, inputs, targets)
    found = {name: None if gradient is None else gradient.to_dense() for name, gradient in gradients_of(model).items()}
    assert_same_gradients(found, gradients_of(moved))
    assert torch.equal(loss, here.detach())
    assert_same_bits(dict(model.named_parameters()), weights)  # type: ignore[arg-type]
    assert_same_bits(dict(model.named_buffers()), dict(expected.named_buffers()))  # one update: the first pass's


@by_case
def test_a_penalty_on_the_gradients_norm_mixes_the_gradients_here_and_there(case: Case) -> None:
    """Zhao et al. (2022): (1 − λ/r) g + (λ/r) ∇L(w + r g/‖g‖)."""
    model, inputs, targets = make(case)
    here, there = copy.deepcopy(model), copy.deepcopy(model)
    case.loss_fn(run_model(here, inputs), targets).backward()
    SharpnessAwareGradient(there, rho=0.1).backward(case.loss_fn, inputs, targets)
    expected = {
        name: None if gradient is None else 0.3 * gradient.to_dense() + 0.7 * gradients_of(there)[name].to_dense()
        for name, gradient in gradients_of(here).items()
    }
    loss = SharpnessAwareGradient(model, rho=0.1, share=0.7).backward(case.loss_fn, inputs, targets)
    assert_same_gradients(gradients_of(model), expected)
    assert torch.isfinite(loss)
    assert_same_bits(dict(model.named_buffers()), dict(here.named_buffers()))  # type: ignore[arg-type]


def test_a_small_step_gives_the_gradient_of_the_penalty() -> None:
    """The gradient of L + λ‖∇L‖₂, by autograd of autograd."""
    model, inputs, targets = make(Case(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))))
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(inputs), targets)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    norm = torch.cat([part.flatten() for part in gradient]).norm()
    expected = torch.autograd.grad(loss + 0.2 * norm, parameters)
    r = 1e-5
    SharpnessAwareGradient(model, rho=r, share=0.2 / r).backward(F.cross_entropy, inputs, targets)
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5)


@BOTH
def test_training_is_that_of_pytorch_optimizer(rho: float, adaptive: bool) -> None:
    pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed (tests/oracles.txt)")
    from pytorch_optimizer import SAM

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    other = copy.deepcopy(model)
    ours = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    theirs = SAM(other.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=0.1, momentum=0.9)
    sharpness = SharpnessAwareGradient(model, rho=rho, adaptive=adaptive)
    for _ in range(10):
        inputs, targets = torch.randn(16, 6).double(), torch.randint(3, (16,))
        ours.zero_grad()
        sharpness.backward(F.cross_entropy, inputs, targets)
        ours.step()
        theirs.zero_grad()
        F.cross_entropy(other(inputs), targets).backward()
        theirs.first_step(zero_grad=True)
        F.cross_entropy(other(inputs), targets).backward()
        theirs.second_step(zero_grad=True)
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        # Its norm is float32.
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)


def test_under_autocast_the_second_pass_sees_the_moved_weights() -> None:
    """Autocast keeps half-precision copies of weights while its context lasts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = torch.randn(16, 6), torch.randint(3, (16,))
    expected, moved = copy.deepcopy(model), copy.deepcopy(model)

    def backward(network: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(network(inputs), targets).backward()

    backward(expected)
    gradients = {name: g for name, g in gradients_of(expected).items() if g is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter += 2.0 * gradients[name] / norm
    backward(moved)
    with torch.autocast("cpu", torch.bfloat16):
        SharpnessAwareGradient(model, rho=2.0).backward(F.cross_entropy, inputs, targets)
        after = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), after)
    for name, gradient in gradients_of(moved).items():
        torch.testing.assert_close(gradients_of(model)[name], gradient, rtol=0.02, atol=1e-3)
        assert not torch.allclose(gradients[name], gradient, rtol=0.02, atol=1e-3)  # so it makes a difference


def test_a_step_within_autocast_goes_back_through_what_is_float32_in_float32() -> None:
    assert_goes_back_outside_autocast(
        lambda model, x, y: SharpnessAwareGradient(model, rho=1e-12).backward(F.cross_entropy, x, y)
    )


def test_both_passes_drop_the_same_units() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: outputs.append(output == 0))
    for _ in range(2):
        SharpnessAwareGradient(model).backward(F.cross_entropy, torch.randn(4, 6).double(), torch.arange(4) % 3)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_gradient_is_clipped() -> None:
    model, inputs, targets = make(Case(lambda: nn.Linear(6, 3)))
    SharpnessAwareGradient(model, max_grad_norm=1e-3).backward(F.cross_entropy, inputs, targets)
    assert float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_of_zero_moves_nothing() -> None:
    model = nn.Linear(6, 3)

    def flat(output: Tensor, targets: Any) -> Tensor:
        return (0 * output).sum()

    SharpnessAwareGradient(model).backward(flat, torch.randn(4, 6), None)
    assert all(bool((parameter.grad == 0).all()) for parameter in model.parameters())


def test_weights_and_buffers_are_put_back_when_the_second_pass_raises() -> None:
    model, inputs, targets = make(Case(lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))))
    calls = 0

    def failing(output: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("second pass")
        return F.cross_entropy(output, y)

    once = copy.deepcopy(model)
    once(inputs)
    with pytest.raises(RuntimeError, match="second pass"):
        SharpnessAwareGradient(model).backward(failing, inputs, targets)
    assert_same_bits(snapshot(model), snapshot(once))


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(FlatminimaError, match="must return a scalar"):
        SharpnessAwareGradient(nn.Linear(6, 3)).backward(lambda output, _: output, torch.randn(4, 6), None)
