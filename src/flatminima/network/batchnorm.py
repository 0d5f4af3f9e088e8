"""Which mean and variance BatchNorm normalizes with, for as long as a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.torch_compat import BatchNorm, own_buffers

BatchStatistics = Literal["sub-batch", "whole-batch", "running"]


@contextmanager
def batch_statistics(model: nn.Module, forward: Callable[[], Any], policy: BatchStatistics) -> Iterator[None]:
    """Which mean and variance torch's BatchNorm layers in training mode normalize with.

    Args:
        model: the model; other normalization layers, and BatchNorm layers in evaluation mode, stay as they are.
        forward: runs the model on the whole batch.
        policy: ``"sub-batch"``, ``"whole-batch"`` or ``"running"``, see :class:`~flatminima.FisherTraceRegularizer`.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm) and m.training}
    if policy == "sub-batch" or not layers:
        yield
        return
    statistics = _observed(layers, forward) if policy == "whole-batch" else _running(layers)
    before = {name: dict(own_buffers(layer)) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.training = False
            own_buffers(layer).update(statistics[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.training = True
            own_buffers(layer).update(before[name])


def _running(layers: dict[str, BatchNorm]) -> dict[str, dict[str, Tensor | None]]:
    for name, layer in layers.items():
        if layer.running_mean is None:
            raise FlatminimaError(
                f"BatchNorm layer {name} keeps no running statistics: choose another batch_statistics than 'running'"
            )
    return {name: {} for name in layers}


def _observed(layers: dict[str, BatchNorm], forward: Callable[[], Any]) -> dict[str, dict[str, Tensor | None]]:
    """Mean and biased variance per channel of each layer's input, as BatchNorm itself uses them in training."""
    found: dict[str, dict[str, Tensor | None]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name in found:
                raise FlatminimaError(
                    f"BatchNorm layer {name} runs twice in one forward, so it has no one whole-batch statistic: "
                    "choose batch_statistics='sub-batch' or 'running'"
                )
            (x,) = inputs
            variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
            found[name] = {"running_mean": mean, "running_var": variance}

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(observe(name)).remove)
        forward()
    return {name: found.get(name, {}) for name in layers}


@contextlib.contextmanager
def chunk_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalizes by the batch and leaves its running statistics alone; all else stays in eval mode."""
    layers = [m for m in model.modules() if isinstance(m, BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, tracked in zip(layers, tracking, strict=True):
            layer.training, layer.track_running_stats = False, tracked
