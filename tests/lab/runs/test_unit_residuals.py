from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.lab.runs.unit_residuals import UnitResidualGradient
from support.regularizer_cases import (
    assert_goes_back_outside_autocast,
    assert_same_bits,
    assert_same_gradients,
    gradients_of,
    mlp,
    snapshot,
    with_norm,
)


def loss_fn(logits: Tensor, targets: tuple[Tensor, Any]) -> Tensor:
    return F.cross_entropy(logits, targets[0], label_smoothing=0.1)


def batch(samples: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    labels = torch.randint(3, (samples,))
    return torch.randn(samples, 6).double(), (labels, torch.arange(samples))


def expected_gradients(
    model: nn.Module, inputs: Tensor, targets: Any, parts: list[slice], alpha: float, beta: float
) -> dict[str, Tensor | None]:
    """∇[L + βR_α] by plain autograd, with R_α's losses ⟨logits, δ/‖δ‖⟩, δ of the model as it is here."""
    logits = model(inputs)
    (delta,) = torch.autograd.grad(loss_fn(logits, targets), logits, retain_graph=True)
    loss_fn(logits, targets).backward()
    here = [parameter.detach().clone() for parameter in model.parameters()]
    for rows in parts:
        directions = delta[rows] / delta[rows].norm(dim=1, keepdim=True)

        def gradient(rows: slice = rows, directions: Tensor = directions) -> tuple[Tensor, ...]:
            inner = (model(inputs[rows]) * directions).sum() / len(directions)
            return torch.autograd.grad(inner, list(model.parameters()))

        there = gradient()
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), there, strict=True):
                parameter -= alpha * step
        moved = gradient()
        with torch.no_grad():
            for parameter, value, a, b in zip(model.parameters(), here, there, moved, strict=True):
                parameter.copy_(value)
                parameter.grad += beta / len(parts) * (a - b)
    return gradients_of(model)


@pytest.mark.parametrize("count", [1, 6], ids=["one sub-batch", "every sample its own"])
def test_the_gradient_is_that_of_the_definition(count: int) -> None:
    """With one sub-batch, or one for each sample, it does not matter how the batch is split."""
    torch.manual_seed(0)
    model = mlp().double()
    inputs, targets = batch(6)
    parts = [slice(0, 6)] if count == 1 else [slice(i, i + 1) for i in range(6)]
    expected = expected_gradients(copy.deepcopy(model), inputs, targets, parts, alpha=0.05, beta=3.0)
    way = UnitResidualGradient(model, alpha=0.05, beta=3.0, num_sub_batches=count, label_smoothing=0.1)
    before = snapshot(model)
    for _ in range(2):  # and it acts on every step
        model.zero_grad()
        loss = way.backward(loss_fn, inputs, targets)
        assert_same_gradients(gradients_of(model), expected)
        assert torch.equal(loss, loss_fn(model(inputs), targets).detach())
        assert_same_bits(snapshot(model), before)


def test_the_penalty_does_not_fade_where_float32_loses_the_residual() -> None:
    """At losses of 1e-9 and less the penalty is as large as ever, and float32 agrees with float64."""
    torch.manual_seed(0)
    model = mlp().double()
    inputs, _ = batch(6)
    labels = model(inputs).argmax(1)
    gradients = []
    for scale in (1.0, 700.0):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled[2].weight *= scale
            scaled[2].bias *= scale
        for network, x in ((scaled, inputs), (copy.deepcopy(scaled).float(), inputs.float())):
            UnitResidualGradient(network, alpha=1e-3, beta=1e3, num_sub_batches=1).backward(
                lambda logits, targets: 0 * F.cross_entropy(logits, targets[0]), x, (labels,)
            )
            gradients.append(torch.cat([parameter.grad.flatten().double() for parameter in network.parameters()]))
        if scale > 1:
            assert F.cross_entropy(scaled(inputs), labels) < 1e-9
    for exact, single in (gradients[:2], gradients[2:]):
        assert exact.norm() > 0.1
        assert (single - exact).norm() < 2e-3 * exact.norm()


def test_running_statistics_are_those_after_one_plain_pass() -> None:
    torch.manual_seed(0)
    model = with_norm(nn.BatchNorm1d(5)).double()
    inputs, targets = batch(8)
    before = snapshot(model)
    model(inputs)
    expected = snapshot(model)
    model.load_state_dict(before)
    UnitResidualGradient(model, alpha=0.1, beta=1.0, num_sub_batches=2).backward(loss_fn, inputs, targets)
    assert_same_bits(snapshot(model), expected)


def test_a_step_within_autocast_goes_back_through_what_is_float32_in_float32() -> None:
    def step(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        penalty = UnitResidualGradient(model, alpha=1e-4, beta=0.0, num_sub_batches=2)
        penalty.backward(lambda logits, given: F.cross_entropy(logits, given[0]), inputs, (targets,))

    assert_goes_back_outside_autocast(step)


def test_the_gradient_is_clipped() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = mlp().double(), batch(4)
    way = UnitResidualGradient(model, alpha=0.1, beta=1e3, num_sub_batches=2, max_grad_norm=1e-3)
    way.backward(loss_fn, inputs, targets)
    assert float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    way = UnitResidualGradient(mlp().double(), alpha=0.1, beta=1.0, num_sub_batches=2)
    with pytest.raises(FlatminimaError, match="must return a scalar"):
        way.backward(lambda output, _: output, *batch(4))
