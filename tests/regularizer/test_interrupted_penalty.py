"""Interrupted at any line, a penalty leaves nothing behind, and the interruption arrives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.regularizer import FisherTraceRegularizer
from flatminima.torch_compat import compiler_stance
from support.interruptions import what_interruptions_leave
from support.regularizer_cases import SEED

WAYS: list[dict[str, Any]] = [
    {},
    {"estimator": "hvp"},
    {"batch_statistics": "whole-batch"},
    {"main_gradient": "sub-batches"},
    {"passes": "together"},
]


@pytest.mark.parametrize("moments", [30, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()) or "default")
def test_an_interruption_at_any_line_leaves_nothing_behind_and_arrives(way: dict[str, Any], moments: int) -> None:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.ReLU(), nn.Linear(5, 3))
    model[2].eval()
    data = torch.randn(8, 6), torch.randint(3, (8,))
    regularizer = FisherTraceRegularizer(model, num_sub_batches=2, alpha=0.1, **way)

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def call() -> None:
        regularizer.penalize(closure, data)

    left = what_interruptions_leave(call, model, moments, SEED)
    assert not left, "\n".join(left)


def test_an_interrupted_step_leaves_no_part_of_a_gradient() -> None:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(8, 6), torch.randint(3, (8,))
    regularizer = FisherTraceRegularizer(model, num_sub_batches=2)

    def interrupt(gradient: Tensor) -> None:
        if model[2].weight.grad is not None:  # the penalty's gradient is there, and part of the main one
            raise KeyboardInterrupt

    model[0].weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        regularizer.backward(F.cross_entropy, *data)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiled_models_run_their_graphs_after_an_interruption_that_a_context_manager_never_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch._dynamo.eval_frame")
    before, set_stance = compiler_stance(), torch.compiler.set_stance

    def interrupted(stance: str) -> None:
        set_stance(stance)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.compiler, "set_stance", interrupted)
    model = nn.Linear(6, 3)
    with pytest.raises(KeyboardInterrupt):
        FisherTraceRegularizer(model, num_sub_batches=2, estimator="hvp").penalize(
            lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (torch.randn(8, 6), torch.randint(3, (8,)))
        )
    assert compiler_stance() == before
