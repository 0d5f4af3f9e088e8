"""Models whose parameters FSDP2 (``fully_shard``) has split: which processes share them, and what each holds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.parallel.processes import Processes
from flatminima.torch_compat import forget_interrupted_pass


def is_sharded(parameter: Tensor) -> bool:
    """Whether each process holds a part of the parameter only (FSDP2 and other DTensor schemes)."""
    return type(parameter.data).__name__ == "DTensor"  # the class itself is slow to import


def shard_of(parameter: Tensor) -> Tensor:
    """The values of a parameter that this process holds: all, unless it is sharded."""
    held: Tensor = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
    return held.detach()


def whole(tensor: Tensor) -> Tensor:
    """A tensor computed from shards as a plain one, the same on all processes."""
    joined: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return joined


def processes_of(model: nn.Module) -> Processes:
    """The processes that the model's parameters are split over. Gathered parameters are given back (``reshard``).

    Raises:
        FlatminimaError: for a model that is sharded by anything but ``fully_shard`` along first dimensions.
    """
    if any(cls.__name__ == "FullyShardedDataParallel" for module in model.modules() for cls in type(module).__mro__):
        raise FlatminimaError("FullyShardedDataParallel (FSDP1) is not supported: shard with fully_shard (FSDP2)")
    reshard(model)
    sharded: dict[str, Any] = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    if not sharded:
        return Processes()
    mesh = next(iter(sharded.values())).device_mesh
    for name, parameter in sharded.items():
        *others, last = parameter.placements
        if parameter.device_mesh != mesh or not last.is_shard(0) or not all(p.is_replicate() for p in others):
            raise FlatminimaError(
                f"parameter {name!r} is sharded as {parameter.placements} on {parameter.device_mesh}: only fully_shard "
                "along first dimensions on one mesh is supported; gather the weights into a plain module"
            )
    dimension = mesh.ndim - 1
    return Processes(mesh.get_local_rank(dimension), mesh.size(dimension), mesh.get_group(dimension))


@contextmanager
def shared(model: nn.Module) -> Iterator[Processes]:
    """The processes that the model's parameters are split over; see :meth:`Processes.together` for this block.

    The model can be used again after an exception: FSDP2 forgets the pass it came from.
    """
    processes = processes_of(model)
    with processes.together():
        try:
            yield processes
        except BaseException:
            _forget_pass(model)
            raise


def reshard(model: nn.Module) -> None:
    """Put gathered parameters back to their shards, and back to ``requires_grad`` as the shards have it."""
    for module in fsdp_modules(model):
        module.reshard()


def gathered_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters as modules hold them while they run; FSDP2 makes these objects once."""
    found: dict[str, nn.Parameter] = {}
    for module in fsdp_modules(model):
        module.unshard()
        found |= {name: p for name, p in model.named_parameters() if not is_sharded(p)}
        module.reshard()
    return found


def _forget_pass(model: nn.Module) -> None:
    for module in outermost_fsdp_modules(model):
        forget_interrupted_pass(module)


def outermost_fsdp_modules(model: nn.Module) -> list[Any]:
    """Those of :func:`fsdp_modules` that are in no other."""
    modules = fsdp_modules(model)
    inner = {child for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if module not in inner]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on, outer ones first."""
    if "torch.distributed.fsdp" not in sys.modules:  # it takes seconds to import
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
