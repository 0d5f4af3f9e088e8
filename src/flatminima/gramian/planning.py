"""How to form ξ within a memory budget: how many samples at once, and which parameters' rows in which pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flatminima.errors import FlatminimaError
from flatminima.network import Inputs, RefusedAutocast, call_model, explained_errors, tensors_of
from flatminima.parallel import is_sharded
from flatminima.torch_compat import hides_what_is_saved

EFFICIENT_CHUNK = 8
"""Samples in a pass below which it takes notably longer per sample. Beyond, memory is better spent on rows of J."""

TRANSIENT = 1.25
"""A pass's memory as a factor of the saved activations: gradients and copies come, but activations go meanwhile."""

PIECEWISE = 0.96
"""The part of the budget that a plan of several passes fills: the allocator loses some between so many pieces."""

LOGITS = 8
"""Tensors of the logits' size that the loss's gradient takes: it is formed in float64."""


@dataclass(frozen=True)
class Piece:
    """``parameter[start:stop]`` of the parameter called ``name``."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """How ξ will be formed.

    Attributes:
        samples: N'.
        chunk: samples per forward and backward pass.
        passes: the pieces of parameters whose rows are formed in each pass over the samples. With all samples in one
            chunk there is one pass, as rows are then multiplied out and freed as they come.
        activation_bytes: what one chunk's forward and backward pass needs.
        rows_bytes: the rows held at once, at most.
        budget: bytes that may be used.
    """

    samples: int
    chunk: int
    passes: tuple[tuple[Piece, ...], ...]
    activation_bytes: int
    rows_bytes: int
    budget: int

    @property
    def at_once(self) -> bool:
        """Whether all rows are formed in one pass over all samples, and multiplied out as they come."""
        return len(self.passes) == 1 and self.chunk >= self.samples

    @property
    def affordable_samples(self) -> int:
        """How many samples' activations the budget holds while there are no rows."""
        return max(1, self.budget * self.chunk // max(1, self.activation_bytes))

    def __str__(self) -> str:
        chunks = -(-self.samples // self.chunk)
        return (
            f"{len(self.passes)} pass{'es' if len(self.passes) > 1 else ''} over {chunks} "
            f"chunk{'s' if chunks > 1 else ''} of {self.chunk} samples; "
            f"{_gib(self.activation_bytes)} of activations and {_gib(self.rows_bytes)} of rows, of {_gib(self.budget)}"
        )


def make_plan(
    samples: int, parameters: Mapping[str, Tensor], sample_bytes: int, rows_at_once: int, budget: int
) -> Plan:
    """The plan with the fewest forward and backward passes that the budget allows.

    Args:
        samples: N'.
        parameters: by name; only their shapes and types are read.
        sample_bytes: what a forward and backward pass takes for one sample (:func:`pass_bytes`).
        rows_at_once: bytes of rows held at once while all samples fit one chunk.
        budget: bytes.

    Raises:
        FlatminimaError: if not even one sample and one slice of a parameter fit.
    """
    pieces = tuple(Piece(name, 0, first_dimension(p)) for name, p in parameters.items())
    if sample_bytes * samples + rows_at_once <= budget:
        return Plan(samples, samples, (pieces,), sample_bytes * samples, rows_at_once, budget)
    smallest = max(samples * row_bytes(parameter) for parameter in parameters.values())
    usable = int(PIECEWISE * budget)
    most = min(samples, (usable - smallest) // max(sample_bytes, 1))
    if most < 1:
        least = int((sample_bytes + smallest) / PIECEWISE) + 1
        raise FlatminimaError(
            f"a memory budget of {_gib(budget)} is too small: one sample takes {_gib(sample_bytes)}, the thinnest "
            f"slice of rows {_gib(smallest)}; allow at least {_gib(least)}, or lower subset_size"
        )
    plans = []
    for chunk in range(most, min(most, EFFICIENT_CHUNK) - 1, -1):
        passes = tuple(_fill(parameters, samples, usable - chunk * sample_bytes))
        held = max(sum(samples * (p.stop - p.start) * row_bytes(parameters[p.name]) for p in one) for one in passes)
        plans.append(Plan(samples, chunk, passes, chunk * sample_bytes, held, budget))
    return min(plans, key=lambda plan: len(plan.passes))


_GRADIENTS_NEED_FLOAT32 = (
    "where gradients would be rounded to half precision: measure copy.deepcopy(model).double(), which autocast leaves "
    "alone, or the model inside"
)


def pass_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Bytes that a forward and backward pass of these inputs takes beside model and inputs: an estimate."""
    with explained_errors(model, inputs), torch.enable_grad(), RefusedAutocast(_GRADIENTS_NEED_FLOAT32):
        try:
            saved, logits = _saved_bytes(model, inputs)
        except RuntimeError as error:
            if not hides_what_is_saved(error):
                raise
            with _Outputs() as outputs:
                logits = call_model(model, inputs)
            saved = outputs.bytes
    return int(TRANSIENT * saved) + LOGITS * logits.numel() * logits.element_size()


def _saved_bytes(model: nn.Module, inputs: Inputs) -> tuple[int, Tensor]:
    """What autograd saves for the backward pass, and the logits."""

    def owned() -> set[int]:
        tensors = (*model.parameters(), *model.buffers(), *tensors_of(inputs))
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if not is_sharded(tensor)}

    sharded = any(map(is_sharded, model.parameters()))
    existing = owned()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # FSDP2 gives parameters memory for as long as their module runs.
        if storage.data_ptr() not in (owned() if sharded else existing):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a result handed back as it is would hold its own graph, and so itself, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = call_model(model, inputs)
    return sum(saved.values()), logits


class _Outputs(TorchFunctionMode):
    """Adds up what all calls return: more than is saved, for models in which this cannot be seen."""

    bytes = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(output))
        return output


def _fill(parameters: Mapping[str, Tensor], samples: int, budget: int) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces whose rows for all samples fit the budget together."""
    one: list[Piece] = []
    left = budget
    for name, parameter in parameters.items():
        row, start = samples * row_bytes(parameter), 0
        while start < first_dimension(parameter):
            if left < row:
                yield tuple(one)
                one, left = [], budget
            stop = min(first_dimension(parameter), start + left // row)
            one.append(Piece(name, start, stop))
            left -= (stop - start) * row
            start = stop
    if one:
        yield tuple(one)


def first_dimension(parameter: Tensor) -> int:
    """The length of the dimension that rows are sliced along; 1 for a scalar."""
    return parameter.shape[0] if parameter.dim() else 1


def row_bytes(parameter: Tensor) -> int:
    """Bytes of one sample's gradient for one entry of the parameter's first dimension."""
    return parameter.numel() // max(first_dimension(parameter), 1) * parameter.element_size()


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
