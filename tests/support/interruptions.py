"""Calls that are interrupted at a chosen line, and everything of a model and the process that may not show it."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn

from flatminima.torch_compat import checkpoint_variants, compiler_stance, float32_switches, func_levels, function_modes


class InterruptAtLine:
    """A trace function that raises ``KeyboardInterrupt`` at the n-th line that is executed, in whatever function.

    Attributes:
        lines: how many have been.
        where: the line that it was, if it was reached.
    """

    def __init__(self, number: int | None) -> None:
        self.number, self.lines, self.where = number, 0, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.number:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that our calls touch and put back, in values that compare."""
    modules = list(model.modules())
    return {
        "tensors": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "buffers": [id(buffer) for buffer in model.buffers()],
        "parameters": [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()],
        "modes": [module.training for module in modules],
        "forwards": ["forward" in vars(module) for module in modules],
        "hooks": [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules],
        "switches": [getattr(holder, name) for holder, name, _, _ in float32_switches()],
        "gradients recorded": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "function modes": function_modes(),
        "compiler's stance": compiler_stance(),
        "checkpoints": (checkpoint_variants(), torch.utils.checkpoint.CheckpointFunction),
        "levels of torch.func": func_levels(),
        "torch's generator": torch.get_rng_state().tolist(),
        "Python's generator": random.getstate(),
        "numpy's generator": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]  # noqa: NPY002
    }


def interrupted(call: Callable[[], object], number: int | None) -> InterruptAtLine:
    """Run ``call`` under the trace function; an interruption must arrive if its line was reached."""
    trace, before = InterruptAtLine(number), sys.gettrace()
    arrived = False
    gc.disable()  # it would free what other tests have left, at some line or other, where nothing can be raised
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        arrived = True
    finally:
        sys.settrace(before)
        gc.enable()
    assert arrived == bool(trace.where), f"the interruption at {trace.where} was swallowed"
    return trace


def what_interruptions_leave(call: Callable[[], object], model: nn.Module, moments: int, seed: int) -> list[str]:
    """What differs after interruptions at random lines of ``call``, and where these were.

    Args:
        call: draws from torch's generator at most.
        model: what it works on.
        moments: how many interruptions.
        seed: for them and for the call.
    """
    for _ in range(2):  # what is imported or filled at first use
        torch.manual_seed(seed)
        lines = interrupted(call, None).lines
    left = []
    for number in sorted(random.Random(seed).sample(range(1, lines), min(moments, lines - 1))):
        torch.manual_seed(seed)
        before = state_of(model)
        trace = interrupted(call, number)
        after = state_of(model)
        if trace.where:
            left += [f"{name} at {trace.where}" for name in before if before[name] != after[name]]
    return left
