"""What: a model whose parameters FSDP2 (``fully_shard``) has split over processes → which rows of J each one forms.

ξ is a sum over slices of parameters' first dimensions, and FSDP2 splits along these. So all processes run the same
samples, each forms the rows of its own part of every parameter, and the parts of ξ are added up. A parameter that FSDP2
left whole is split in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.network.batches import tensors_of
from flatminima.planning import first_dimension
from flatminima.processes import Processes


def is_sharded(parameter: Tensor) -> bool:
    """Whether each process holds a part of the parameter only (FSDP2 and other DTensor schemes)."""
    return type(parameter.data).__name__ == "DTensor"  # the class itself is slow to import


@dataclass(frozen=True)
class Part:
    """``parameter[start:stop]``, the rows of J that this process forms for a parameter.

    Attributes:
        parameter: the whole parameter as calls and autograd see it; FSDP2 gives it its values while they are needed.
        start: the part's first index, along the first dimension.
        stop: the index behind its last; empty parts have ``start == stop``.
        longest: the length of the longest part of any process.
        values: ``parameter[start:stop]``.
    """

    parameter: nn.Parameter
    start: int
    stop: int
    longest: int
    values: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter, processes: Processes, values: Tensor | None = None) -> Part:
        """The part of this process; ``values`` of a sharded parameter are its shard."""
        length = first_dimension(parameter)
        longest = -(-length // processes.size)
        start = min(processes.rank * longest, length)
        stop = min(start + longest, length)
        if values is None:
            whole = parameter.detach()
            values = (whole if whole.dim() else whole.unsqueeze(0))[start:stop]
        return cls(parameter, start, stop, longest, values)

    def range(self, start: int, stop: int) -> tuple[int, int]:
        """Where ``start`` to ``stop``, counted from the part's own beginning, is in the parameter."""
        return min(self.start + start, self.stop), min(self.start + stop, self.stop)

    def longest_shape(self) -> Tensor:
        """A tensor without data of the shape and type of the longest part."""
        shape = (self.longest, *self.parameter.shape[1:])
        return torch.empty(shape, dtype=self.parameter.dtype, device="meta")


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

    The model can be used again after an exception: FSDP2 forgets the pass it came from (torch 2.13 and newer can).
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


def parts_of(model: nn.Module, parameters: Mapping[str, nn.Parameter], processes: Processes) -> dict[str, Part]:
    """This process's part of each of ``parameters``, the model's own by name. Gathers sharded ones once, in turn.

    Raises:
        FlatminimaError: for parameters that FSDP2 does not gather as they are: tensor parallelism, another type.
    """
    whole = _gathered(model) if any(map(is_sharded, parameters.values())) else {}
    parts = {}
    for name, parameter in parameters.items():
        if not is_sharded(parameter):
            parts[name] = Part.of(parameter, processes)
            continue
        shard = shard_of(parameter)
        used = whole.get(name)
        if used is None or is_sharded(used):
            raise FlatminimaError(
                f"parameter {name!r} is sharded by another scheme than fully_shard (tensor parallelism?): "
                "gather the weights into a plain module"
            )
        if (used.dtype, used.device) != (shard.dtype, shard.device):
            raise FlatminimaError(
                f"parameter {name!r} is {shard.dtype} on {shard.device} but used as {used.dtype} on {used.device}: "
                "call fully_shard without mp_policy and offload_policy to measure"
            )
        parts[name] = Part.of(used, processes, shard)
    return parts


@contextmanager
def following_inputs(model: nn.Module, follow: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``follow(tensor, other)`` where FSDP2 hands a module ``other`` in the place of its argument ``tensor``."""
    given: list[list[Tensor]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(tensors_of((args, kwargs)))

    def after(module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor, other in zip(given.pop(), tensors_of((args, kwargs)), strict=True):
            follow(tensor, other)

    with ExitStack() as stack:
        for module in fsdp_modules(model):
            stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_pre_hook(after, with_kwargs=True).remove)
        yield


def _gathered(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters as modules hold them while they run; FSDP2 makes these objects once."""
    found: dict[str, nn.Parameter] = {}
    for module in fsdp_modules(model):
        module.unshard()
        found |= {name: p for name, p in model.named_parameters() if not is_sharded(p)}
        module.reshard()
    return found


def _forget_pass(model: nn.Module) -> None:
    for module in outermost_fsdp_modules(model):
        if hasattr(module, "reset_iter_state"):
            with suppress(AttributeError):  # raised before the first pass
                module.reset_iter_state()


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
