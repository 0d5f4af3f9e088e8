"""ξ̂ as it grows: rows of J are multiplied out and added, parameter by parameter, and freed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from flatminima.gramian.parts import Part
from flatminima.gramian.planning import (
    Piece,
    row_bytes,
)
from flatminima.gramian.products import times_own_transpose
from flatminima.gramian.recording import RecordedUse
from flatminima.losses import LogitGradient
from flatminima.network import float64_device, in_float64
from flatminima.parallel import Processes

ROWS_BUDGET_BYTES = 256 * 2**20
"""Rows of J held at once. A larger parameter is taken in slices of its first dimension, ..."""

CACHED_ROWS_BYTES = 16 * 2**20
"""... on a CPU even of this: rows are multiplied out while they are in the cache, and their memory is used again, where
fresh memory from the system would take as long as the arithmetic."""

_SEED = 2024
"""Of the weights for checks; any will do, and the same on all processes."""

_EVEN_SLICE = 16
"""Longer slices are multiples of this, as kernels for convolutions and products like it."""


class Accumulator:
    """ξ̂ as it grows, parameter by parameter; this process's part of it until :meth:`add_up`.

    Attributes:
        unit: (N', N') float64, the sum so far.
        loss: (N',) float64, of the samples noted so far.
        log_scale: (N',) float64, the logarithms of the norms of their gradients at the logits.
        shares: each parameter's own part by name, if asked for.
        weights: (N',) float64, random weights c of the samples, for checks.
        forms: (parameters, 2) float64, cᵀξ_p c of every parameter's part ξ_p, and the same of ξ_p's diagonal alone.
    """

    def __init__(self, n: int, parts: Mapping[str, Part], *, scale_invariant: bool, shares: bool) -> None:
        device = next(iter(parts.values())).parameter.device
        self.names = {id(part.parameter): name for name, part in parts.items()}
        self.parts = {id(part.parameter): part for part in parts.values()}
        self.scale_invariant = scale_invariant
        self.unit = torch.zeros(n, n, dtype=torch.float64, device=float64_device(device))
        self.loss, self.log_scale = self.unit.new_zeros(n), self.unit.new_zeros(n)
        generator = torch.Generator("cpu").manual_seed(_SEED)
        weights = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") + 0.5
        weights *= torch.randint(0, 2, (n,), generator=generator, device="cpu") * 2 - 1
        self.weights, self.forms = weights.to(self.unit), self.unit.new_zeros(len(parts), 2)
        self._numbers = {key: number for number, key in enumerate(self.names)}
        self.shares = {name: torch.zeros_like(self.unit) for name in parts} if shares else None

    def __len__(self) -> int:
        return len(self.unit)

    def note(self, samples: slice, delta: LogitGradient) -> None:
        """Keep the losses of these samples and the norms of their gradients at the logits."""
        self.loss[samples], self.log_scale[samples] = delta.loss, delta.log_norm

    def add_rows(self, parameter: nn.Parameter, rows: Tensor, start: int, stop: int) -> None:
        """Add the product of ``rows`` (N', stop − start, ...), the rows of J for ``parameter[start:stop]``."""
        if start == stop:
            return
        if self.scale_invariant:
            part = self.parts[id(parameter)]
            rows = rows * part.values[start - part.start : stop - part.start].abs()
        product = torch.zeros_like(self.unit)
        _add_product(product, rows)
        self._add(parameter, product)

    def add_use(self, parameter: nn.Parameter, uses: Sequence[RecordedUse]) -> None:
        """Add a parameter's JJᵀ; rows of several uses (tied or reused parameters) are summed before the product."""
        part = self.parts[id(parameter)]
        arrived = [(use.use, use.grad) for use in uses if use.grad is not None]
        if len(arrived) == 1 and arrived[0][0].product is not None and not self.scale_invariant:
            use, grad = arrived[0]
            self._add(parameter, use.product(grad, part.start, part.stop))  # type: ignore[misc]
            return
        for start, stop in slices(parameter, len(self), part.start, part.stop):
            rows = _summed_rows(uses, start, stop)
            if rows is not None:
                self.add_rows(parameter, rows, start, stop)

    def add_up(self, processes: Processes) -> None:
        """Sum over processes that formed the rows of different parts."""
        for part in (self.unit, *(self.shares or {}).values()):
            processes.add_up(part)

    def without_rows(self) -> list[str]:
        """The parameters of which this process has no row of J that is not zero."""
        squares = self.forms[:, 1].tolist()
        return [name for name, square in zip(self.names.values(), squares, strict=True) if square == 0]

    def _add(self, parameter: nn.Parameter, product: Tensor) -> None:
        product = in_float64(product).to(self.unit.device)
        self.unit += product
        form = self.forms[self._numbers[id(parameter)]]
        form[0] += self.weights @ (product @ self.weights)
        form[1] += product.diagonal() @ self.weights.square()
        if self.shares is not None:
            self.shares[self.names[id(parameter)]] += product


class ChunkedRows:
    """The rows of J of some pieces of parameters, filled chunk by chunk of samples and then multiplied out."""

    def __init__(self, samples: int, pieces: Sequence[Piece], parts: Mapping[str, Part]) -> None:
        self.total = samples
        self.samples = slice(0, 0)
        self.pieces: dict[int, list[tuple[int, int]]] = {}
        for piece in pieces:
            part = parts[piece.name]
            found = slices(part.parameter, samples, *part.range(piece.start, piece.stop))
            self.pieces.setdefault(id(part.parameter), []).extend(found)
        self.rows: dict[tuple[int, int, int], Tensor] = {}
        self.parameters = {id(part.parameter): part.parameter for part in parts.values()}

    def add_use(self, parameter: nn.Parameter, uses: Sequence[RecordedUse]) -> None:
        """Put this chunk's rows, summed over the parameter's uses, in their place."""
        for start, stop in self.pieces[id(parameter)]:
            rows = _summed_rows(uses, start, stop)
            if rows is not None:
                key = id(parameter), start, stop
                if key not in self.rows:
                    self.rows[key] = _zeros_laid_out_like(rows, self.total)
                self.rows[key][self.samples] = rows

    def add_to(self, xi: Accumulator, left_out: set[int]) -> None:
        """Multiply out; parameters that a later chunk gave up on are left to the generic path."""
        for (parameter, start, stop), rows in self.rows.items():
            if parameter not in left_out:
                xi.add_rows(self.parameters[parameter], rows, start, stop)


def _summed_rows(uses: Sequence[RecordedUse], start: int, stop: int) -> Tensor | None:
    """The rows of J for ``parameter[start:stop]``, summed over its uses; None where no gradient reached any."""
    total = None
    arrived = [(use.use, use.grad) for use in uses if use.grad is not None]
    for use, grad in sorted(arrived, key=lambda pair: pair[0].added is not None):  # sparse ones onto dense ones
        if total is not None and use.added is not None:
            total = use.added(total, grad, start, stop)
        else:
            rows = use.rows(grad, start, stop)
            total = rows if total is None else total + rows
    return total


def _zeros_laid_out_like(rows: Tensor, samples: int) -> Tensor:
    """Zeros for more samples in the memory layout of ``rows``, so that copying them over is one sweep."""
    order = sorted(range(rows.dim()), key=rows.stride, reverse=True)
    zeros = rows.new_zeros([samples if d == 0 else rows.shape[d] for d in order])
    return zeros.permute([order.index(d) for d in range(rows.dim())])


def slices(parameter: nn.Parameter, n: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``parameter[start:stop]``'s first dimension whose rows for n samples fit the budget."""
    step = slice_length(n * row_bytes(parameter), parameter.device)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def slice_length(row: int, device: torch.device) -> int:
    """How many entries of a parameter's first dimension to take at once, whose rows take ``row`` bytes each."""
    most = max(1, ROWS_BUDGET_BYTES // max(row, 1))
    length = min(most, CACHED_ROWS_BYTES // max(row, 1)) if device.type == "cpu" else most
    even = max(_EVEN_SLICE, length - length % _EVEN_SLICE)
    return even if even <= most else max(1, length)


def _add_product(unit: Tensor, rows: Tensor) -> None:
    """``unit += rows rowsᵀ`` for rows in any memory layout, without copying them into another one.

    Products are in the rows' precision, their sum over blocks and parameters in float64: products in float64 too move
    ln det ξ by less than 1e-5, a hundredth of what the float32 rows themselves err by.
    """
    n = rows.shape[0]
    columns = sorted(range(1, rows.dim()), key=rows.stride, reverse=True)  # their order does not matter, as in memory
    outer = [d for d in columns if rows.stride(d) > rows.stride(0)]
    inner = columns[len(outer) :]
    for block in rows.permute(*outer, 0, *inner).reshape(math.prod(rows.shape[d] for d in outer), n, -1):
        unit += times_own_transpose(block).to(unit.device)
