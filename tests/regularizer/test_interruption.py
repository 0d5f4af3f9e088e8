"""Interrupted at any line, a penalty leaves nothing behind, and the interruption arrives."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.regularizer import FisherTraceRegularizer
from flatminima.torch_compat import float32_switches
from support.regularizer_cases import SEED

MOMENTS = 400
"""Of each way; more are a matter of minutes."""


class InterruptAtLine:
    """A trace function that raises ``KeyboardInterrupt`` at the n-th line that is executed, in whatever function."""

    def __init__(self, number: int | None) -> None:
        self.number, self.lines = number, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.number:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def network() -> nn.Module:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.ReLU(), nn.Linear(5, 3))
    model[2].eval()
    return model


def state(model: nn.Module) -> list[Any]:
    """Everything that a penalty touches, in values that compare."""
    return [
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        [id(buffer) for buffer in model.buffers()],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        [(m.training, "forward" in vars(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        [getattr(holder, name) for holder, name, _, _ in float32_switches()],
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]  # noqa: NPY002 - the one that is restored
    ]


def run(regularizer: FisherTraceRegularizer, model: nn.Module, data: Any, number: int | None) -> InterruptAtLine:
    """One penalty under a trace function; interrupted, unless ``number`` is None."""

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    trace, before = InterruptAtLine(number), sys.gettrace()
    arrived = False
    sys.settrace(trace)
    try:
        regularizer.penalize(closure, data)
    except KeyboardInterrupt:
        arrived = True
    finally:
        sys.settrace(before)
    assert arrived == (number is not None)
    return trace


WAYS: list[dict[str, Any]] = [
    {},
    {"estimator": "hvp"},
    {"batch_statistics": "whole-batch"},
    {"main_gradient": "sub-batches"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()) or "default")
def test_an_interruption_at_any_line_leaves_nothing_behind_and_arrives(way: dict[str, Any]) -> None:
    model = network()
    regularizer = FisherTraceRegularizer(model, num_sub_batches=2, alpha=0.1, **way)
    torch.manual_seed(SEED)
    data = torch.randn(8, 6), torch.randint(3, (8,))
    run(regularizer, model, data, None)  # what is imported or filled at first use
    torch.manual_seed(SEED)
    lines = run(regularizer, model, data, None).lines
    draws = random.Random(SEED)
    left_behind = []
    for number in sorted(draws.sample(range(1, lines), MOMENTS)):
        torch.manual_seed(SEED)
        before = state(model)
        where = run(regularizer, model, data, number).where
        after = state(model)
        left_behind += [(where, i) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert not left_behind, "\n".join(map(str, left_behind))
