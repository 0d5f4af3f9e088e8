"""Which rows of J each process forms: its part of every trainable parameter.

ξ is a sum over slices of parameters' first dimensions, and FSDP2 splits along these. So all processes run the same
samples, each forms the rows of its own part of every parameter, and the parts of ξ are added up. A parameter that FSDP2
left whole is split in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.gramian.planning import (
    first_dimension,
)
from flatminima.network import require_usable
from flatminima.parallel import Processes, gathered_parameters, is_sharded, reshard, shard_of


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


def parts_of(model: nn.Module, parameters: Mapping[str, nn.Parameter], processes: Processes) -> dict[str, Part]:
    """This process's part of each of ``parameters``, the model's own by name. Gathers sharded ones once, in turn.

    Raises:
        FlatminimaError: for parameters that FSDP2 does not gather as they are: tensor parallelism, another type.
    """
    whole = gathered_parameters(model) if any(map(is_sharded, parameters.values())) else {}
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


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; tied ones once.

    Raises:
        FlatminimaError: if there is none, or if they are sharded.
        NonFiniteError: if one holds NaN or infinity; names it.
    """
    reshard(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise FlatminimaError(f"parameter {name!r} is sharded over processes: gather the weights first")
    return {name: part.parameter for name, part in trainable_parts(model, Processes()).items()}


def trainable_parts(model: nn.Module, processes: Processes) -> dict[str, Part]:
    """This process's part of every parameter that requires gradients, by name; tied ones once.

    Args:
        model: the model.
        processes: those it is split over, from :func:`flatminima.parallel.fsdp.processes_of`.

    Raises:
        FlatminimaError: if there is none.
        NonFiniteError: if a parameter holds NaN or infinity; names it.
    """
    processes.attempt(lambda: _refuse_unsuitable_parameters(model))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise FlatminimaError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad on those that the measure is over"
        )
    return parts_of(model, parameters, processes)


def _refuse_unsuitable_parameters(model: nn.Module) -> None:
    require_usable(model)
    for name, parameter in model.named_parameters():
        if not shard_of(parameter).isfinite().all():
            raise NonFiniteError(
                f"NaN or infinity in parameter {name!r}: the checkpoint is broken or training diverged; load another"
            )


def common_dtype(parts: Mapping[str, Part]) -> torch.dtype:
    """The floating-point type of all parameters; refuses mixed and half-precision ones."""
    dtypes = {part.parameter.dtype for part in parts.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        if any(dtype.is_complex for dtype in dtypes):
            raise FlatminimaError(
                f"parameters are {names}, and gradients of complex ones have no rows here: hold real and imaginary "
                "parts as real parameters (torch.view_as_complex in forward), or freeze them"
            )
        raise FlatminimaError(
            f"parameters are {names}: measure in one of float32 and float64 (copy.deepcopy(model).float())"
        )
    return dtypes.pop()
