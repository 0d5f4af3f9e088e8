"""The network's own precision, whatever the main pass uses, for measuring and for penalty passes.

What is formed of their results (losses, gradients at the logits, ξ) is float64, on the network's device if that has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""


@contextlib.contextmanager
def true_precision() -> Iterator[None]:
    """Autocast off and float32 arithmetic in float32 (no TF32, no bf16 products), restored afterwards.

    Small differences of gradients, and eigenvalues four decades below the largest, are lost in reduced precision.
    """
    with contextlib.ExitStack() as stack:
        for device in filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps")):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(float32_products(tf32=False))
        yield


@contextlib.contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Products of float32 numbers in float32 or, on GPUs that have it, in TF32 (10 bits); restored afterwards."""
    with contextlib.ExitStack() as stack:
        for holder, name, exact, fast in float32_switches():
            before = getattr(holder, name)
            stack.callback(setattr, holder, name, before)
            setattr(holder, name, fast if tf32 else exact)
        yield


def float64_device(device: torch.device) -> torch.device:
    """Where float64 work for a network on ``device`` is done: there, or on the CPU if it has none."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, on :func:`float64_device` of its own."""
    return tensor.to(float64_device(tensor.device)).double()  # moved first: it cannot be converted on the old device


def back_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A float64 tensor in the type and on the device of ``other``."""
    return tensor.to(other.dtype).to(other.device)


def float32_switches() -> list[tuple[Any, str, Any, Any]]:
    """(object, attribute, exact value, value for TF32) of every switch that trades float32 accuracy for speed.

    The CPU stays exact.

    From 2.9 on PyTorch has one switch per backend and operator, and reading the older ones fails once a user has set
    a newer one; before, there were two.
    """
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        operators = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        mkldnn = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
        return [
            *((operator, "fp32_precision", "ieee", "tf32") for operator in operators),
            *((operator, "fp32_precision", "ieee", "ieee") for operator in mkldnn),
        ]
    return [(backends.cuda.matmul, "allow_tf32", False, True), (backends.cudnn, "allow_tf32", False, True)]
