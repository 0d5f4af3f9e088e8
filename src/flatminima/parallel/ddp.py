"""Models in ``DistributedDataParallel``, whose forward pass exchanges buffers: every process must then run it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatminima.torch_compat import uncompiled


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """The model as DDP's, compiled around it (``torch.compile(DistributedDataParallel(...))``) or not; None if not."""
    inner = uncompiled(model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def without_exchanges(model: nn.Module) -> nn.Module:
    """The module inside DDP, which is whole on every process and runs on one alone; any other as it is."""
    parallel = data_parallel(model)
    return model if parallel is None else without_exchanges(parallel.module)
