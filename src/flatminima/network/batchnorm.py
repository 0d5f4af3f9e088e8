"""Which mean and variance torch's BatchNorm layers normalize with, for as long as a block runs.

There are three, and both wings speak of the same ones:

* the *running* statistics (``batchnorm="eval"`` in measuring, ``batch_statistics="running"`` in penalty passes);
* those of the very samples that a pass runs on (a chunk: ``batchnorm=n``; a sub-batch: ``"sub-batch"``);
* those of a larger batch, taken once and held constant (``"whole-batch"``).

Other normalization layers, and dropout, stay as they are. And :func:`sound_batchnorm`, for passes of single samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flatminima.errors import require
from flatminima.network.batches import replaced_forward
from flatminima.torch_compat import BatchNorm, hold, own_buffers, scripted_batch_norms

BatchStatistics = Literal["sub-batch", "whole-batch", "running"]

_BATCH_NORMS = frozenset({F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm})
"""Instance normalization is a batch normalization of one sample to PyTorch."""


@contextmanager
def sound_batchnorm() -> Iterator[None]:
    """Right gradients through batch normalizations of a single sample, from forward passes inside.

    PyTorch's own backward pass on a CPU (2.13 and before) reads the gradient of one sample as if it had memory of its
    own. Where it is an expanded view, as that of a mean over positions is, all it gives is wrong, without a word. So it
    is given memory of its own here.
    """
    with _GradientsOfTheirOwn():
        yield


class _GradientsOfTheirOwn(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _BATCH_NORMS and output.shape[0] == 1 and output.requires_grad:
            output.register_hook(Tensor.contiguous)
        return output


@contextmanager
def chunk_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm layers of a model in evaluation mode normalize by what they are run on; running statistics stay.

    What this process runs them on: SyncBatchNorm would join it with what others run, another trial's samples.
    """
    _refuse_scripted(model)
    layers = _layers(model)
    with _restored(layers), this_process_statistics(model):
        for layer in layers.values():
            layer.training, layer.track_running_stats = True, False
        yield


@contextmanager
def this_process_statistics(model: nn.Module) -> Iterator[None]:
    """SyncBatchNorm normalizes as BatchNorm does, by what this process runs it on, and exchanges nothing."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                stack.enter_context(replaced_forward(module, BatchNorm.forward.__get__(module)))
        yield


@contextmanager
def batch_statistics(model: nn.Module, forward: Callable[[], Any], policy: BatchStatistics) -> Iterator[None]:
    """What those BatchNorm layers normalize with that are in training mode.

    Args:
        model: the model; BatchNorm layers in evaluation mode stay as they are.
        forward: runs the model on the whole batch.
        policy: ``"sub-batch"``, ``"whole-batch"`` or ``"running"``, see :class:`~flatminima.FisherTraceRegularizer`.

    Raises:
        FlatminimaError: for a layer that has no running statistics, or no one whole-batch statistic.
    """
    if policy != "sub-batch":
        _refuse_scripted(model)
    layers = {name: layer for name, layer in _layers(model).items() if layer.training}
    if policy == "sub-batch" or not layers:
        yield
        return
    statistics = _observed(layers, forward) if policy == "whole-batch" else _running(layers)
    with _restored(layers):
        for name, layer in layers.items():
            layer.training = False
            hold(own_buffers(layer), statistics[name])
        yield


def _refuse_scripted(model: nn.Module) -> None:
    names = scripted_batch_norms(model)
    require(
        not names,
        f"BatchNorm layer {next(iter(names), '')!r} is TorchScript's, whose statistics cannot be chosen: pass the "
        "model without torch.jit, or leave batchnorm or batch_statistics out",
    )


def _layers(model: nn.Module) -> dict[str, BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}


@contextmanager
def _restored(layers: Mapping[str, BatchNorm]) -> Iterator[None]:
    """Give the layers back what they normalized with: mode, tracking of running statistics, and buffers."""
    before = [(layer, layer.training, layer.track_running_stats, dict(own_buffers(layer))) for layer in layers.values()]
    try:
        yield
    finally:
        for layer, training, tracking, buffers in before:
            layer.training, layer.track_running_stats = training, tracking
            hold(own_buffers(layer), buffers)


def _running(layers: Mapping[str, BatchNorm]) -> dict[str, dict[str, Tensor | None]]:
    for name, layer in layers.items():
        require(
            layer.running_mean is not None,
            f"BatchNorm layer {name} keeps no running statistics: choose another batch_statistics than 'running'",
        )
    return {name: {} for name in layers}


def _observed(layers: Mapping[str, BatchNorm], forward: Callable[[], Any]) -> dict[str, dict[str, Tensor | None]]:
    """Mean and biased variance per channel of each layer's input, as BatchNorm itself uses them in training."""
    found: dict[str, dict[str, Tensor | None]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            require(
                name not in found,
                f"BatchNorm layer {name} runs twice in one forward, so it has no one whole-batch statistic: "
                "choose batch_statistics='sub-batch' or 'running'",
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
