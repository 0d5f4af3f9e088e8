"""Inference mode, another default device, other threads: the same numbers, or one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.measures import evaluate
from flatminima.network import samples_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")

torch.manual_seed(0)
X, Y = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 3
OPTIONS: dict[str, Any] = {"subset_size": 6, "trials": 2, "progress": False}


class Network(nn.Module):
    """With a layer that must not run in training mode, and takes its time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.002)
        assert not any(module.training for module in self.modules())
        logits: Tensor = self.head(self.body(x))
        return logits


OTHER = Network()


def binary(logits: Tensor, targets: Tensor) -> Tensor:
    """A callable that autograd keeps the targets of."""
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def others(found: fm.Characterization) -> list[tuple[str, str]]:
    """What was measured, by name; as text, for NaN is not itself."""
    return [(name, str(estimate.per_trial)) for name, estimate in found.estimates().items()]


WIDE = nn.Linear(3, 60).double()
USES: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "measure": lambda model, x, y: fm.measure(model, (x, y), **OPTIONS).log_det_fisher.per_trial,
    "measure, exact Fisher": lambda m, x, y: fm.measure(m, (x, y), fisher="model", **OPTIONS).log_det_fisher.per_trial,
    "measure, passes": lambda m, x, y: fm.measure(m, (x, y), memory_budget=30_000, **OPTIONS).log_det_fisher.per_trial,
    "measure, batch statistics": lambda m, x, y: fm.measure(m.body, (x, y), batchnorm=3, **OPTIONS).spectrum,
    "compare": lambda model, x, y: fm.compare({"a": model, "b": OTHER}, (x, y), **OPTIONS).difference("a", "b"),
    "measure, all": lambda m, x, y: others(fm.measure(m, (x, y), measures="all", **OPTIONS | {"trials": 1})),
    "measure, many classes": lambda m, x, y: others(fm.measure(nn.Sequential(m, WIDE), (x, y), **OPTIONS)),
    "landscape": lambda m, x, y: fm.landscape(m, (x, y), steps=3, progress=False).losses,
    "landscape, Hessian": lambda m, x, y: fm.landscape(m, (x, y), directions="hessian", steps=3, progress=False).losses,
    "gram": lambda model, x, y: fm.gram(model, x[:6], y[:6]).tolist(),
    "gram of a callable": lambda m, x, y: fm.gram(m, x[:6], x[:6, :3].sigmoid(), loss=binary).tolist(),
    "exact Fisher": lambda model, x, y: fm.exact_fisher(model, x, y).tolist(),
    "exact Hessian": lambda model, x, y: fm.exact_hessian(model, x, y).tolist(),
}


@pytest.mark.parametrize("use", USES)
def test_inference_mode_changes_nothing(use: str) -> None:
    expected = USES[use](Network(), X, Y)
    model = Network()
    with torch.inference_mode():
        assert USES[use](model, X.clone(), Y.clone()) == expected
        assert torch.is_inference_mode_enabled()


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = Network()
    with pytest.raises(FlatminimaError, match=r"'body\.0\.weight' was made in inference mode"):
        fm.gram(model, X, Y)


@pytest.mark.parametrize("use", USES)
def test_the_default_device_changes_nothing(use: str) -> None:
    model, expected = Network(), USES[use](Network(), X, Y)
    torch.set_default_device("meta")
    try:
        assert USES[use](model, X, Y) == expected
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("use", USES)
def test_the_default_type_changes_nothing(use: str) -> None:
    model, expected = Network(), USES[use](Network(), X, Y)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert USES[use](model, X, Y) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("passes", ["one-by-one", "together"])
def test_the_default_device_and_type_change_no_step_of_training(passes: Any) -> None:
    def gradients() -> list[Tensor]:
        model = nn.Linear(5, 3, dtype=torch.float64, device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.1)
        torch.manual_seed(0)
        regularizer = fm.FisherTraceRegularizer(model, num_sub_batches=3, max_grad_norm=0.1, passes=passes)
        regularizer.backward(nn.functional.cross_entropy, X, Y)
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = gradients()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_that_want_the_same_model_take_turns() -> None:
    model = Network().train()
    model.body[1].eval()
    expected = USES["measure"](Network(), X, Y)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda use: USES[use](model, X, Y), ["measure", "measure", "gram"]))
    assert results[:2] == [expected, expected]
    assert [model.training, model.body[1].training, model.head.training] == [True, False, True]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model_of", [lambda model: model, nn.DataParallel])
def test_no_thread_sees_weights_that_another_has_moved(model_of: Callable[[nn.Module], nn.Module]) -> None:
    model = Network()
    uses = ["landscape", "measure", "landscape, Hessian", "gram"]
    expected = [USES[use](Network(), X, Y) for use in uses]
    with ThreadPoolExecutor(len(uses)) as pool:
        found = list(pool.map(lambda use: USES[use](model_of(model), X, Y), uses))
        between = pool.submit(lambda: fm.landscape(Network(), (X, Y), directions="between", to=model, steps=5))
        USES["landscape"](model, X, Y)
        with pytest.raises(FlatminimaError, match="are the model's own"):
            between.result()
    assert found == expected


def test_evaluations_take_turns_too() -> None:
    model = Network().train()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: evaluate(model, samples_of((X, Y))).loss, range(3)))
    assert set(found) == {evaluate(Network(), samples_of((X, Y))).loss}
    assert all(module.training for module in model.modules())


class Counter(nn.Module):
    """Counts its passes in a buffer, and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.net = Network()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.last = x.detach().mean(0)
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("use", ["measure", "gram", "compare", "landscape", "landscape, Hessian"])
def test_buffers_that_forward_changes_are_what_they_were(use: str) -> None:
    model = Counter()
    before = dict(model.named_buffers())
    USES[use](model, X, Y)
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == {n: id(b) for n, b in before.items()}
    assert model.passes == 0
    assert torch.equal(model.last, torch.zeros(1))
