"""What: how to form ξ within a memory budget: how many samples at once, and which parameters' rows in which pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flatminima.batching import Inputs, call_model
from flatminima.errors import FlatminimaError

FREE_SHARE = 0.5
"""The part of the free memory that is used if the user names no budget."""

ACTIVATION_SHARE = 0.5
"""The part of the budget that activations may take; the rows of J take the rest."""

TRANSIENT = 2.0
"""What a backward pass needs beside the saved activations, as a factor: gradients of activations, padded copies."""


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

    def __str__(self) -> str:
        chunks = -(-self.samples // self.chunk)
        return (
            f"{len(self.passes)} pass{'es' if len(self.passes) > 1 else ''} over {chunks} "
            f"chunk{'s' if chunks > 1 else ''} of {self.chunk} samples; "
            f"{_gib(self.activation_bytes)} of activations and {_gib(self.rows_bytes)} of rows, of {_gib(self.budget)}"
        )


def make_plan(
    samples: int, parameters: Mapping[str, nn.Parameter], sample_bytes: int, rows_at_once: int, budget: int
) -> Plan:
    """The plan with the fewest forward and backward passes that the budget allows.

    Args:
        samples: N'.
        parameters: by name.
        sample_bytes: what is saved for one sample between forward and backward (:func:`saved_bytes`).
        rows_at_once: bytes of rows held at once while all samples fit one chunk.
        budget: bytes.

    Raises:
        FlatminimaError: if not even one sample and one slice of a parameter fit.
    """
    pieces = tuple(Piece(name, 0, first_dimension(p)) for name, p in parameters.items())
    needed = int(TRANSIENT * sample_bytes)
    if needed * samples + rows_at_once <= budget:
        return Plan(samples, samples, (pieces,), needed * samples, rows_at_once, budget)
    chunk = min(samples, int(ACTIVATION_SHARE * budget) // max(needed, 1))
    for_rows = budget - max(chunk, 1) * needed
    smallest = max(samples * row_bytes(parameter) for parameter in parameters.values())
    if chunk < 1 or for_rows < smallest:
        raise FlatminimaError(
            f"a memory budget of {_gib(budget)} is too small: one sample takes {_gib(needed)}, the thinnest slice of "
            f"rows {_gib(smallest)}; allow at least {_gib(2 * needed + 2 * smallest)}, or lower subset_size"
        )
    passes = tuple(_fill(parameters, samples, for_rows))
    rows_bytes = max(sum(samples * (p.stop - p.start) * row_bytes(parameters[p.name]) for p in one) for one in passes)
    return Plan(samples, chunk, passes, chunk * needed, rows_bytes, budget)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 * 2**30  # where the system does not tell: what a laptop has to spare


def saved_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Bytes that autograd saves for a backward pass of these inputs, parameters and buffers left out."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = call_model(model, inputs)
    return sum(saved.values()) + 4 * logits.numel() * logits.element_size()


def _fill(parameters: Mapping[str, nn.Parameter], samples: int, budget: int) -> Iterator[tuple[Piece, ...]]:
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
