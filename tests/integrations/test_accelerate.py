from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flatminima.errors import FlatminimaError
from flatminima.integrations.accelerate import backward
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.regularizer_cases import SEED, gradients_of, mlp

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_with_accelerate.py"


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Any:
    """Accelerate keeps a precision for the process: neither that of a Trainer's test before, nor ours for one after."""
    _forget_state()
    yield
    _forget_state()


def _forget_state() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def two_micro_batches(mixed_precision: str) -> tuple[dict[str, Any], dict[str, Any], FisherTraceRegularizer]:
    """Gradients by the integration and by hand, and the integration's regularizer."""
    torch.manual_seed(SEED)
    model, inputs, targets = mlp(), torch.randn(2, 16, 6), torch.randint(3, (2, 16))
    by_hand = copy.deepcopy(model)
    options: dict[str, Any] = {"alpha": 1e-2, "beta": 5.0, "num_sub_batches": 16, "max_grad_norm": 0.1}

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    prepared = accelerator.prepare(model)
    regularizer = FisherTraceRegularizer(prepared, **options)
    for x, y in zip(inputs, targets, strict=True):
        with accelerator.accumulate(prepared):
            backward(accelerator, regularizer, F.cross_entropy, x, y)

    reference = FisherTraceRegularizer(by_hand, **options)
    for k in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            reference.backward(F.cross_entropy, inputs[k], targets[k], weight=0.5, last=k == 1)
    return gradients_of(model), gradients_of(by_hand), regularizer


def test_same_gradient_as_by_hand() -> None:
    actual, expected, regularizer = two_micro_batches("no")
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)
    assert regularizer.step == 1
    assert regularizer.diagnostics()["clip_rate"] == 1.0


def test_bfloat16_leaves_the_penalty_in_float32() -> None:
    """Accelerate's autocast sits inside the model's forward."""
    *_, full = two_micro_batches("no")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    actual, expected, mixed = two_micro_batches("bf16")
    assert mixed.last_step is not None
    assert full.last_step is not None
    torch.testing.assert_close(mixed.last_step.trace, full.last_step.trace)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0.02, atol=1e-3)


def test_refuses_engines_with_a_backward_of_their_own() -> None:
    accelerator = SimpleNamespace(distributed_type=accelerate.utils.DistributedType.DEEPSPEED)
    with pytest.raises(FlatminimaError, match="DEEPSPEED is not supported"):
        backward(accelerator, FisherTraceRegularizer(mlp()), F.cross_entropy, torch.zeros(2, 6), torch.zeros(2))
    accelerator = SimpleNamespace(distributed_type=accelerate.utils.DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(FlatminimaError, match="FSDP1 is not supported"):
        backward(accelerator, FisherTraceRegularizer(mlp()), F.cross_entropy, torch.zeros(2, 6), torch.zeros(2))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_example_trains(mixed_precision: str) -> None:
    found = runpy.run_path(str(EXAMPLE))["main"](mixed_precision)
    assert found["steps"] == 24
    assert found["last_loss"] < 0.7 * found["first_loss"]
    assert found["fisher_trace"] > 0


def test_the_example_steps_with_the_gradients_of_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's optimizers zero nothing but before the last micro-batch, where they would clear the others'."""
    added = [torch.zeros(())]
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(accelerator: Any, regularizer: FisherTraceRegularizer, *batch: Any) -> torch.Tensor:
        def norm() -> torch.Tensor:
            gradients = [p.grad.norm() for p in regularizer.model.parameters() if p.grad is not None]
            return torch.stack(gradients).norm() if gradients else torch.zeros(())

        before.append((norm(), added[-1] if accelerator.sync_gradients else torch.zeros(())))
        loss = backward(accelerator, regularizer, *batch)
        added.append(norm())
        return loss

    monkeypatch.setattr("flatminima.integrations.accelerate.backward", watched)
    runpy.run_path(str(EXAMPLE))["main"]()
    assert len(before) == 48
    for found, expected in before:
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_example_runs_on_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    subprocess.run(command, check=True, timeout=200)


def test_checkpoint_holds_the_counters(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    regularizer = FisherTraceRegularizer(accelerator.prepare(mlp()), num_sub_batches=2)
    accelerator.register_for_checkpointing(regularizer)
    regularizer.step = 7
    accelerator.save_state(str(tmp_path))
    regularizer.step = 0
    accelerator.load_state(str(tmp_path))
    assert regularizer.step == 7
