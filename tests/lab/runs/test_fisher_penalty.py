from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

from flatminima.errors import FlatminimaError
from flatminima.lab.runs.fisher_penalty import FisherPenaltyGradient
from support.regularizer_cases import assert_goes_back_outside_autocast, assert_same_bits, mlp, snapshot, with_norm

DRAWS = 300


def gradient_at(model: nn.Module, inputs: Tensor, labels: Tensor, weight: float) -> Tensor:
    """weight · ∇‖g‖² = 2 weight · H g of the mean loss at these labels, with a Hessian that is written out."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
        return F.cross_entropy(functional_call(model, weights, (inputs,)), labels)

    found: Tensor = 2 * weight * hessian(loss)(flat) @ grad(loss)(flat)
    return found


def test_the_penalty_is_that_of_labels_which_the_model_draws() -> None:
    """Of two samples there are nine gradients, and each comes as often as the softmax says."""
    torch.manual_seed(0)
    model = mlp().double()
    inputs, targets = torch.randn(2, 6).double(), torch.tensor([0, 2])
    choices = list(itertools.product(range(3), repeat=2))
    gradients = torch.stack([gradient_at(model, inputs, torch.tensor(choice), 0.3) for choice in choices])
    main = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))
    main_gradient = torch.cat([part.flatten() for part in main])

    drawn: Counter[int] = Counter()
    penalty = FisherPenaltyGradient(model, weight=0.3)
    for _ in range(DRAWS):
        model.zero_grad()
        loss = penalty.backward(F.cross_entropy, inputs, targets)
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]) - main_gradient
        distances = (gradients - found).norm(dim=1)
        assert distances.min() < 1e-12
        assert distances.topk(2, largest=False).values[1] > 1e-4
        drawn[int(distances.argmin())] += 1
    assert torch.equal(loss, F.cross_entropy(model(inputs), targets))
    probabilities = model(inputs).softmax(1).detach()
    for number, (first, second) in enumerate(choices):
        expected = float(probabilities[0, first] * probabilities[1, second])
        assert abs(drawn[number] / DRAWS - expected) < 4 * (expected * (1 - expected) / DRAWS) ** 0.5


def test_weights_and_running_statistics_are_those_after_one_plain_pass() -> None:
    torch.manual_seed(0)
    model = with_norm(nn.BatchNorm1d(5)).double()
    inputs, targets = torch.randn(8, 6).double(), torch.randint(3, (8,))
    before = snapshot(model)
    model(inputs)
    expected = snapshot(model)
    model.load_state_dict(before)
    FisherPenaltyGradient(model, weight=1.0).backward(F.cross_entropy, inputs, targets)
    assert_same_bits(snapshot(model), expected)


def test_both_passes_drop_the_same_units_and_the_penaltys_is_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        FisherPenaltyGradient(model, weight=1.0).backward(F.cross_entropy, torch.randn(4, 6), torch.arange(4) % 3)
    assert [output.dtype for output in outputs] == [torch.bfloat16, torch.float32]
    assert torch.equal(outputs[0] == 0, outputs[1] == 0)


def test_a_step_within_autocast_goes_back_through_what_is_float32_in_float32() -> None:
    assert_goes_back_outside_autocast(
        lambda model, x, y: FisherPenaltyGradient(model, weight=1e-30).backward(F.cross_entropy, x, y)
    )


def test_its_gradient_is_in_float32_too() -> None:
    torch.manual_seed(0)
    model, inputs = mlp().float(), torch.randn(8, 6)
    found = []
    for mixed in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            FisherPenaltyGradient(model, weight=1.0).backward(lambda output, _: 0.0 * output.sum(), inputs, None)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_same_bits(*found)


def test_the_gradient_is_clipped() -> None:
    torch.manual_seed(0)
    model = mlp()
    penalty = FisherPenaltyGradient(model, weight=100.0, max_grad_norm=1e-3)
    penalty.backward(F.cross_entropy, torch.randn(4, 6), torch.arange(4) % 3)
    assert float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(FlatminimaError, match="must return a scalar"):
        FisherPenaltyGradient(mlp(), weight=1.0).backward(lambda output, _: output, torch.randn(4, 6), None)


def test_attention_has_a_penalty_too() -> None:
    """Its fused kernels have no second derivative."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
    FisherPenaltyGradient(model, weight=0.3).backward(F.cross_entropy, torch.randn(4, 3, 8), torch.arange(4) % 3)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
