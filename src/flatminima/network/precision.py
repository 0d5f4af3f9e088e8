"""The network's own precision, whatever the main pass uses, for measuring and for penalty passes.

What is formed of their results (losses, gradients at the logits, ξ) is float64, on the network's device if that has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flatminima.errors import FlatminimaError
from flatminima.network.batches import tensors_of
from flatminima.torch_compat import float32_switches

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""

PENALTIES_NEED_FLOAT32 = (
    "but penalty passes need float32: pass the inner module, and use autocast around the training step"
)
"""What :class:`RefusedAutocast` says of a penalty's passes."""


@contextlib.contextmanager
def true_precision() -> Iterator[None]:
    """Autocast off and float32 arithmetic in float32 (no TF32, no bf16 products), restored afterwards.

    Small differences of gradients, and eigenvalues four decades below the largest, are lost in reduced precision.
    """
    with outside_autocast(), float32_products(tf32=False):
        yield


@contextlib.contextmanager
def outside_autocast() -> Iterator[None]:
    """The caller's autocast off. Backward passes belong here: they take the types of the forward pass by themselves.

    Under autocast they would round what the forward pass has kept in float32.
    """
    with contextlib.ExitStack() as stack:
        for device in filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps")):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class RefusedAutocast(TorchFunctionMode):
    """Notices a forward pass that switches autocast on for itself, within :func:`true_precision`.

    Args:
        so: the message's end: what it would do, and what to do about it.

    Raises:
        FlatminimaError: at the first call under autocast with anything that it would round.
    """

    def __init__(self, so: str) -> None:
        super().__init__()
        self._so = so

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tensors_of([args, kwargs or {}]):
            rounded = tensor.is_floating_point() and tensor.dtype != torch.float64
            kind = tensor.device.type
            if rounded and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                raise FlatminimaError(f"the model switches autocast on inside its forward, {self._so}")
        return func(*args, **(kwargs or {}))


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
