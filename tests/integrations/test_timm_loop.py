from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.regularizer_cases import SEED, with_norm

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train_like_timm.py"))

by_dtype = pytest.mark.parametrize("amp_dtype", ["float32", "bfloat16", "float16"])


def unchanged_epoch(
    model: nn.Module, batches: Any, optimizer: Any, scaler: Any, model_ema: Any, *, amp_dtype: Any, groups: list[int]
) -> None:
    """The loop before the change: ``groups`` says how many micro-batches each update has."""
    waiting = iter(batches)
    for group in groups:
        for _ in range(group):
            inputs, target = next(waiting)
            with torch.autocast("cpu", amp_dtype, enabled=amp_dtype != torch.float32):
                loss = F.cross_entropy(model(inputs), target) / group
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model_ema.update_parameters(model)


def loop_parts(model: nn.Module, amp_dtype: str) -> tuple[Any, Any, AveragedModel]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=amp_dtype == "float16")
    return optimizer, scaler, AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)


@by_dtype
def test_the_change_alone_changes_nothing_else(amp_dtype: str) -> None:
    """Without weight on the penalty, weights, statistics and their average are those of the loop as it was."""
    torch.manual_seed(SEED)
    model = with_norm(nn.BatchNorm1d(5))
    other = copy.deepcopy(model)
    batches = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(5)]

    optimizer, scaler, model_ema = loop_parts(model, amp_dtype)
    regularizer = FisherTraceRegularizer(model, beta=0.0, num_sub_batches=4, max_grad_norm=0.05)
    dtype = getattr(torch, amp_dtype)
    EXAMPLE["train_one_epoch"](
        model, batches, nn.CrossEntropyLoss(), optimizer, regularizer, scaler, model_ema,
        amp_dtype=dtype, grad_accum_steps=2,
    )  # fmt: skip
    optimizer, scaler, expected_ema = loop_parts(other, amp_dtype)
    unchanged_epoch(other, batches, optimizer, scaler, expected_ema, amp_dtype=dtype, groups=[2, 2, 1])

    assert regularizer.step == 3
    assert regularizer.diagnostics()["clip_rate"] == 1.0
    for name, tensor in expected_ema.state_dict().items():
        torch.testing.assert_close(model_ema.state_dict()[name], tensor)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


@by_dtype
def test_example_trains(amp_dtype: str) -> None:
    found = EXAMPLE["main"](amp_dtype)
    assert found["steps"] == 24
    assert found["last_loss"] < 0.7 * found["first_loss"]
    assert found["fisher_trace"] > 0
