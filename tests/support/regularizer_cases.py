"""Models, losses and batches of every shape that the regularizer is checked on, all in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 5

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler"),
        ],
    ),
]
"""What ``torch.compile`` uses: all of it but Inductor takes a tenth of the time."""


class CountingBackend:
    """Counts the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


class Tied(nn.Module):
    """One matrix used three times, twice of them as a registered module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.first(x))))
        return self.head(x @ self.first.weight)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.tanh(self.left(left) + scale * self.right(right)))


class UnusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class HandWrittenBatchNorm(nn.Module):
    """Running statistics in a class that torch does not know; F.batch_norm writes them without a version bump."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("variance", torch.ones(5))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, training=True)


class CountingNoise(nn.Module):
    """A forward that depends on a buffer it changes: every pass of a step must start from the same count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


class Float32Island(nn.Module):
    """A head that stays in float32 under the caller's autocast, backwards as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        with torch.autocast("cpu", enabled=False):
            return self.head(hidden.float())


def assert_goes_back_outside_autocast(step: Callable[[nn.Module, Tensor, Tensor], object]) -> None:
    """A step within autocast whose penalty does nothing leaves the gradients of the pattern that PyTorch recommends."""
    torch.manual_seed(0)
    model, inputs, targets = Float32Island(), torch.randn(16, 6), torch.randint(3, (16,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(inputs), targets)
    expected = torch.autograd.grad(loss, [*model.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        step(model, inputs, targets)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def convolutional(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 5, 3, padding=1), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3)
    )


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 3))


@dataclass
class Case:
    build: Callable[[], nn.Module]
    train: bool = True
    shape_inputs: Callable[[Tensor], Any] = lambda x: x
    loss_fn: Callable[[Any, Any], Tensor] = field(default=F.cross_entropy)
    shape_targets: Callable[[Tensor], Any] = lambda y: y


CASES = {
    "mlp": Case(mlp),
    "relu": Case(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))),
    "batchnorm": Case(lambda: with_norm(nn.BatchNorm1d(5))),
    "batchnorm-eval": Case(lambda: with_norm(nn.BatchNorm1d(5)), train=False),
    "batchnorm-cumulative": Case(lambda: with_norm(nn.BatchNorm1d(5, momentum=None))),
    "batchnorm-2d": Case(lambda: convolutional(lambda: nn.BatchNorm2d(5))),
    "sync-batchnorm": Case(lambda: with_norm(nn.SyncBatchNorm(5))),
    "instancenorm": Case(lambda: convolutional(lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True))),
    "hand-written-batchnorm": Case(lambda: with_norm(HandWrittenBatchNorm())),
    "tied": Case(Tied),
    "frozen": Case(partly_frozen),
    "unused": Case(UnusedLayer),
    "sparse-embedding": Case(
        lambda: nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3)),
        shape_inputs=lambda x: (x.abs() * 4).long().clamp(max=9),
    ),
    "tuple": Case(TwoInputs, shape_inputs=lambda x: (x, x.flip(0))),
    "dict": Case(TwoInputs, shape_inputs=lambda x: {"right": x, "left": x.flip(0), "scale": 0.5}),
    "dict-targets": Case(
        mlp,
        loss_fn=lambda output, targets: (
            targets["weight"] * F.cross_entropy(output, targets["y"], reduction="none")
        ).mean(),
        shape_targets=lambda y: {"y": y, "weight": 1.0 + y},
    ),
    "labels-in-inputs": Case(
        lambda: mlp(), shape_targets=lambda y: None, loss_fn=lambda output, _: output.logsumexp(1).mean()
    ),
    "not-a-mean-over-samples": Case(
        mlp, loss_fn=lambda output, y: F.cross_entropy(output, y, torch.tensor([1.0, 5.0, 0.2]).double())
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case: Case, *, samples: int = 24) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(SEED)
    model = case.build().double().train(case.train)
    x, y = torch.randn(samples, 6).double(), torch.randint(3, (samples,))
    return model, case.shape_inputs(x), case.shape_targets(y)


def select(batch: Any, indices: Tensor) -> Any:
    if isinstance(batch, dict):
        return {key: select(value, indices) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(select(value, indices) for value in batch)
    return batch[indices] if isinstance(batch, Tensor) else batch


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            torch.testing.assert_close(
                actual[name].to_dense(), gradient.to_dense(), rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


def assert_same(
    actual: Iterable[dict[str, Tensor | None]],
    expected: Iterable[dict[str, Tensor | None]],
    *,
    rtol: float = 1e-11,
    atol: float = 1e-13,
) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
