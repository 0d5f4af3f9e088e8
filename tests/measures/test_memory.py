"""Measuring keeps to its budget, and leaves nothing behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.gramian import plan_for
from flatminima.measures import evaluate
from flatminima.network import samples_of

CLASSES = 3


class Counting(nn.Module):
    """Notes the size of every batch that it is run on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, CLASSES))
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.layers(x)
        return logits


def problem(samples: int = 700) -> tuple[Counting, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(samples, 20, dtype=torch.float64), torch.arange(samples) % CLASSES
    return Counting().double(), x, y


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_the_training_loss_keeps_to_the_budget() -> None:
    model, x, y = problem()
    options = {"subset_size": 8, "trials": 1, "measures": (), "progress": False, "loss": nn.CrossEntropyLoss()}
    plan = plan_for(model, x[:8], memory_budget=100_000)
    model.sizes.clear()
    within = fm.measure(model, (x, y), memory_budget=100_000, **options)
    assert plan.chunk < max(model.sizes) == plan.affordable_samples < 200
    model.sizes.clear()
    whole = fm.measure(model, (x, y), **options)
    assert max(model.sizes) == 500
    assert within.train_loss == pytest.approx(whole.train_loss, rel=1e-14)


@pytest.mark.parametrize("batch", [1, 7, 700])
def test_the_training_loss_is_the_same_for_batches_of_any_size(batch: int) -> None:
    model, x, y = problem()
    evaluation = evaluate(model, samples_of((x, y)), batch=batch)
    assert evaluation.loss == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-12)
    assert evaluation.correct == int((model(x).argmax(1) == y).sum())


def everything() -> nn.Module:
    """Layers that save their own results for the backward pass (ReLU, softmax, norms), and a recurrent one."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.group = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)
            self.recurrent, self.attention = (
                nn.LSTM(8, 8, batch_first=True),
                nn.MultiheadAttention(8, 2, batch_first=True),
            )
            self.layer_norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.group(self.norm(self.conv(x)))).transpose(1, 2)
            h = self.recurrent(h)[0].softmax(-1)
            h = self.layer_norm(h + self.attention(h, h, h, need_weights=False)[0])
            logits: Tensor = self.head(torch.sigmoid(h).amax(1))
            return logits

    return Network().double()


X, Y = torch.randn(9, 4, 6, dtype=torch.float64), torch.arange(9) % CLASSES
OPTIONS = {"subset_size": 6, "trials": 2, "progress": False, "loss": nn.CrossEntropyLoss()}
USES = {
    "plan_for": lambda model: plan_for(model, X),
    "gram": lambda model: fm.gram(model, X, Y),
    "measure": lambda model: fm.measure(model, (X, Y), **OPTIONS),
    "measure, every option": lambda model: fm.measure(
        model, (X, Y), fisher="model", scale_invariant=True, per_parameter=True, on_singular="skip", **OPTIONS
    ),
    "measure, batch statistics": lambda model: fm.measure(model, (X, Y), batchnorm=3, **OPTIONS),
    "measure, several passes": lambda model: fm.measure(model, (X, Y), memory_budget=300_000, **OPTIONS),
    "compare": lambda model: fm.compare({"a": model, "b": everything()}, (X, Y), **OPTIONS),
}


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
@pytest.mark.parametrize("use", USES)
def test_a_model_is_freed_after(use: str) -> None:
    model = everything()
    held = [weakref.ref(module) for module in model.modules()] + [weakref.ref(p) for p in model.parameters()]
    result = USES[use](model)
    del model
    gc.collect()
    assert result is not None
    assert [reference() for reference in held if reference() is not None] == []


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_nothing_grows_from_call_to_call() -> None:
    model = everything()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(3):
        fm.measure(model, (X, Y), **OPTIONS)
        fm.gram(model, X, Y)
        counts.append(tensors())
    assert counts[1] == counts[2]
