"""A model that rounds otherwise: what it computes differs as on another machine, or in a batch of another size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def rounded_otherwise(model: nn.Module, size: float, seed: int) -> Iterator[None]:
    """Multiply the entries of every tensor that a module is given by random factors from 1 - ``size`` to 1 + ``size``.

    Only floating-point tensors are, and none that is of a subclass (sharded, for example), in a container, or given to
    a TorchScript module. The factors are those of ``seed`` on every process, and no global generator is drawn from.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def other(values: Any) -> Any:
        if type(values) is not Tensor or not values.is_floating_point():
            return values
        factors = 1 + size * (2 * torch.rand(values.shape, generator=generator, dtype=torch.float64, device="cpu") - 1)
        return values * factors.to(values)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(map(other, args)), {name: other(value) for name, value in kwargs.items()}

    with ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield
