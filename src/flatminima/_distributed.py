"""How: several processes. The penalty's passes stay within one; the main pass exchanges gradients as usual."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from flatminima._isolation import replaced_forward


@contextmanager
def this_process_alone(model: nn.Module) -> Iterator[None]:
    """No communication in forward: DDP hands through to its module, SyncBatchNorm uses this process's statistics.

    So processes may split uneven batches into different numbers of sub-batches without waiting for each other forever.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(replaced_forward(module, module.module.__call__))
            elif isinstance(module, nn.SyncBatchNorm):
                stack.enter_context(replaced_forward(module, _BatchNorm.forward.__get__(module)))
        yield


def exchange(model: nn.Module, *, wanted: bool) -> AbstractContextManager[Any]:
    """Let the main pass exchange gradients between processes, or not."""
    return nullcontext() if wanted or not isinstance(model, DistributedDataParallel) else model.no_sync()


def average_gradients(model: nn.Module, parameters: list[Tensor]) -> None:
    """The exchange of a DDP model whose main pass did not run: one all-reduce of all gradients."""
    if not isinstance(model, DistributedDataParallel):
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined, group=model.process_group)
    joined /= dist.get_world_size(model.process_group)
    parts = torch.split(joined, [gradient.numel() for gradient in gradients])
    for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
        parameter.grad = gradient.copy_(part.view_as(gradient))
