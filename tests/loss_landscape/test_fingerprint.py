"""What tells one landscape from another, also where both have the same loss at the minimum."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.loss_landscape.fingerprint import fingerprint
from flatminima.losses import CrossEntropy, Loss
from flatminima.network import add_tensor, samples_of

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3)}


def known(data: tuple[Any, Tensor], loss: Loss = "cross_entropy", weights: dict[str, Tensor] = WEIGHTS) -> str:
    return fingerprint(["random", 0], loss, [weights], samples_of(data))


def a_function(gamma: float) -> Loss:
    """Made anew, at another address, by every call."""

    def focal(logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses * (1 - (-losses).exp()) ** gamma

    return focal


def with_gamma(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    return gamma * F.cross_entropy(logits, targets, reduction="none")


def a_lambda(gamma: float) -> Loss:
    return lambda logits, targets: gamma * F.cross_entropy(logits, targets, reduction="none")


def a_function_around(gamma: float) -> Loss:
    inner = functools.partial(with_gamma, gamma=torch.tensor(gamma))
    return lambda logits, targets: inner(logits, targets)


class WithAttribute(nn.Module):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma


class WithBuffer(nn.Module):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.register_buffer("gamma", torch.tensor(gamma), persistent=False)


class Plain(WithAttribute):
    __repr__ = object.__repr__


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy,
        lambda label_smoothing: nn.CrossEntropyLoss(label_smoothing=label_smoothing),
        lambda gamma: functools.partial(with_gamma, gamma=gamma),
        a_function,
        a_lambda,
        a_function_around,
        WithAttribute,
        WithBuffer,
        Plain,
    ],
)
def test_a_loss_is_known_by_its_options(data: tuple[Tensor, Tensor], loss: Any) -> None:
    assert known(data, loss(0.1)) == known(data, loss(0.1))
    assert known(data, loss(0.1)) != known(data, loss(0.2))


def test_a_loss_is_known_by_its_name(data: tuple[Tensor, Tensor]) -> None:
    assert known(data, "cross_entropy") == known(data, CrossEntropy())
    assert len({known(data), known(data, nn.CrossEntropyLoss(reduction="sum")), known(data, nn.MSELoss())}) == 3
    assert known(data, a_function(1.0)) == known(data, a_function(1.0))
    assert known(data, a_function(1.0)) not in (known(data), known(data, functools.partial(with_gamma, gamma=1.0)))


@pytest.mark.parametrize("samples", [24, 1001])
def test_every_sample_counts(samples: int) -> None:
    inputs, targets = torch.zeros(samples, 2), torch.arange(samples) % 3
    expected = known((inputs, targets))
    for part in range(2):
        changed = inputs.clone(), targets.clone()
        changed[part][-1] = 1 - changed[part][-1]
        assert known((inputs, targets)) == expected != known(changed)


def test_types_shapes_and_names_count(data: tuple[Tensor, Tensor]) -> None:
    zeros = torch.zeros(6)
    others = [zeros.reshape(2, 3), zeros.int(), zeros.double()[:3], torch.zeros(0), torch.zeros(0, 2)]
    found = [known(data, weights={"weight": tensor}) for tensor in (zeros, *others)]
    assert len({*found, known(data, weights={"bias": zeros})}) == 7


def test_a_tensor_of_any_size_is_handed_on_without_a_copy() -> None:
    seen = []

    class Measured:
        def update(self, content: Any) -> None:
            seen.append(memoryview(content).nbytes)

    add_tensor(Measured(), torch.empty(2**32 + 1, dtype=torch.uint8))  # whose memory is reserved, and never touched
    assert seen[-1] == 2**32 + 1


def test_functions_of_one_name_are_told_apart_by_the_names_and_constants_in_their_code(
    data: tuple[Tensor, Tensor],
) -> None:
    losses = [
        lambda logits, targets: (logits.square().sum(1) - targets) * 2.0,
        lambda logits, targets: (logits.square().sum(1) - targets) * 3.0,
        lambda logits, targets: (logits.abs().sum(1) - targets) * 2.0,
        lambda logits, targets, factor=2.0: (logits.square().sum(1) - targets) * factor,
        lambda logits, targets, factor=3.0: (logits.square().sum(1) - targets) * factor,
    ]
    assert len({known(data, loss) for loss in losses}) == len(losses)


def test_a_function_that_encloses_itself_is_known(data: tuple[Tensor, Tensor]) -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none") if loss else logits

    assert known(data, loss) == known(data, loss)
