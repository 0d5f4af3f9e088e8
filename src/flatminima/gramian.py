"""What: a model, a loss and N' samples → ξ = JJᵀ, one parameter at a time. J itself never exists.

ξ is additive over parameters, ξ = Σ_p J_p J_pᵀ, so one forward and one backward pass are enough: the forward pass
records every use of every trainable parameter (:class:`~flatminima.recording.Recorder`), and the backward pass, which
computes gradients of activations only, hands each use its output gradient, forms that parameter's rows, adds their
product to ξ (:class:`_Accumulator`) and frees them. Parameters without a layer rule are differentiated one sample at
a time instead.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, GenericPathWarning, NonFiniteError, WrongGradientError
from flatminima.losses import FactoredLoss, LogitGradient, Loss, logit_gradient, refuse_non_finite
from flatminima.network.batches import Inputs, batch_size, call_model, device_of, map_tensors, take, tensors_of
from flatminima.network.modes import evaluating, frozen
from flatminima.network.precision import float64_device, in_float64, true_precision
from flatminima.planning import FREE_SHARE, Piece, Plan, first_dimension, free_bytes, make_plan, pass_bytes, row_bytes
from flatminima.processes import Processes
from flatminima.products import times_own_transpose
from flatminima.recording import RecordedUse, Recorder
from flatminima.sharding import Part, is_sharded, parts_of, reshard, shard_of, shared

ROWS_BUDGET_BYTES = 256 * 2**20
"""Rows of J held at once. A larger parameter is taken in slices of its first dimension, ..."""

CACHED_ROWS_BYTES = 16 * 2**20
"""... on a CPU even of this: rows are multiplied out while they are in the cache, and their memory is used again, where
fresh memory from the system would take as long as the arithmetic."""

_EVEN_SLICE = 16
"""Longer slices are multiples of this, as kernels for convolutions and products like it."""

_Group = list[tuple[nn.Parameter, int, int]]
"""Slices of parameters' first dimensions: (parameter, start, stop)."""

SPOT_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
"""Allowed difference between the checked entries of ξ and plain autograd, relative to the gradients' norms.

Wide enough for float64 models that normalize in float32; rows that are wrong differ by far more."""


@dataclass(frozen=True)
class FactoredGram:
    """ξ in factored form: ξ_ij = exp(log_scale_i + log_scale_j) · unit_ij.

    Attributes:
        unit: (N', N') float64, the Gram matrix of the gradients with the logits' gradient scaled to norm one.
        log_scale: (N',) float64, the logarithms of the logits' gradients' norms.
        loss: (N',) float64, the per-sample losses.
        generic_parameters: names of the parameters that took the generic path.
        dtype: the network's floating-point type, which limits the accuracy of ``unit``.
        shares: every parameter's part of ``unit`` by name, where asked for; they add up to it.
    """

    unit: Tensor
    log_scale: Tensor
    loss: Tensor
    generic_parameters: tuple[str, ...]
    dtype: torch.dtype
    shares: dict[str, Tensor] | None = None

    def matrix(self) -> Tensor:
        """ξ itself, (N', N') float64. Entries below 1e-308 underflow to zero; the factored form never does."""
        scale = self.log_scale.exp()
        return self.unit * scale[:, None] * scale


def gram(model: nn.Module, inputs: Inputs, targets: Tensor, *, loss: Loss = "cross_entropy") -> Tensor:
    """ξ = JJᵀ, the Gram matrix of per-sample loss gradients over all trainable parameters (Jia & Su, Eq. 4–5).

    The model is run in eval mode (BatchNorm by its running statistics, no dropout) and left as it was found.

    Args:
        model: any module; its output is the logits, or an object with ``.logits``. Sharded by FSDP2 (``fully_shard``),
            it is called by all its processes with the same samples; each forms the rows of its own shards, and beside
            what FSDP2 gathers for every pass they exchange the weights once more and the N'×N' sum. An error on one is
            raised on all.
        inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``) of tensors with N' rows.
        targets: (N',) class indices for the cross entropy; whatever ``loss`` takes otherwise.
        loss: ``"cross_entropy"``, or ``loss(logits, targets)`` → (N',) tensor of per-sample losses.

    Returns:
        (N', N') float64: entry i, j is the inner product of the loss gradients of samples i and j.

    Raises:
        NonFiniteError: for NaN or infinity in weights, logits or losses.
        WrongGradientError: if a spot check against plain autograd fails (samples interact within the batch).
        FlatminimaError: for inputs, targets or a loss of the wrong kind, or no trainable parameter.

    Example:
        >>> import torch, flatminima
        >>> model = torch.nn.Linear(4, 3, bias=False)
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> flatminima.gram(model, x, y).shape
        torch.Size([5, 5])
    """
    result = factored_gram(model, inputs, targets, loss=loss)
    warn_generic(result.generic_parameters)
    return result.matrix()


def factored_gram(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    *,
    loss: Loss | FactoredLoss = "cross_entropy",
    logit_normalization: float | None = None,
    batchnorm: Literal["eval"] | int = "eval",
    scale_invariant: bool = False,
    shares: bool = False,
    plan: Plan | None = None,
    spot_check: bool = True,
) -> FactoredGram:
    """ξ in factored form. Arguments and errors as for :func:`gram`, and beside them those below.

    Args:
        model: as for :func:`gram`.
        inputs: as for :func:`gram`.
        targets: as for :func:`gram`.
        loss: as for :func:`gram`.
        logit_normalization: see :func:`flatminima.losses.logit_gradient`.
        batchnorm: ``"eval"`` or a number n: BatchNorm then normalizes by the statistics of consecutive chunks of n
            samples, on which a sample's gradient then depends (the authors' release: 10). Costs n backward passes.
        scale_invariant: weight the columns of J by the parameters' magnitudes.
        shares: keep every parameter's part of ξ̂.
        plan: from :func:`plan_for` (default: made here, for half of the free memory).
        spot_check: compare the rows of two samples with plain autograd.
    """
    model = unwrapped(model)
    with shared(model) as processes:
        inputs = map_tensors(torch.Tensor.detach, inputs)
        n = batch_size((inputs, targets))
        plan = plan or plan_for(model, inputs)
        processes.require_same("samples", lambda: _sums((inputs, targets)))
        parts = trainable_parts(model, processes)
        dtype = _common_dtype(parts)
        xi = _Accumulator(n, parts, scale_invariant=scale_invariant, shares=shares)
        batch = _Batch(model, inputs, targets, loss, logit_normalization)
        generic: dict[str, nn.Parameter] = {}
        with evaluating(model), true_precision(), torch.enable_grad():
            if isinstance(batchnorm, int):
                with _batch_statistics(model):
                    _add_with_batch_statistics(xi, batch, parts, batchnorm)
                xi.add_up(processes)
            else:
                generic, unseen = _add_by_rules(xi, batch, parts, plan)
                if unseen:
                    generic |= _used(batch, unseen, plan.chunk)
                _add_one_by_one(xi, batch, {name: parts[name] for name in generic})
                xi.add_up(processes)
                if spot_check:
                    _check_against_autograd(xi, batch, parts, processes, SPOT_CHECK_TOLERANCE[dtype])
        refuse_non_finite("gradients", xi.unit)
        return FactoredGram(xi.unit, xi.log_scale, xi.loss, tuple(generic), dtype, xi.shares)


def plan_for(model: nn.Module, inputs: Inputs, *, memory_budget: int | None = None) -> Plan:
    """How ξ of these samples would be formed within a memory budget. Costs one forward pass of one sample.

    Args:
        model: as for :func:`gram`.
        inputs: as for :func:`gram`.
        memory_budget: bytes (default: half of what is free on the model's device).

    Raises:
        FlatminimaError: if the budget is too small for one sample and one slice of a parameter.
    """
    model = unwrapped(model)
    budget = int(FREE_SHARE * free_bytes(device_of(model))) if memory_budget is None else memory_budget
    with shared(model) as processes, evaluating(model):
        parts = trainable_parts(model, processes)
        budget = min(processes.gather(lambda: budget))  # one plan for all, as they run the model together
        per_sample = pass_bytes(model, take(inputs, slice(0, 1)))
    reshard(model)  # FSDP2 keeps the outermost module's parameters gathered after a forward pass
    n, longest = batch_size(inputs), {name: part.longest_shape() for name, part in parts.items()}
    rows = {name: n * row_bytes(shape) for name, shape in longest.items()}
    held = max(
        row * min(first_dimension(longest[name]), _slice_length(row, device_of(model))) for name, row in rows.items()
    )
    return make_plan(n, longest, per_sample, held, budget)


def warn_generic(names: Sequence[str], *, stacklevel: int = 3) -> None:
    """Say by a :class:`GenericPathWarning` which parameters had no layer rule, if any."""
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        warnings.warn(
            f"{len(names)} parameters ({shown}) are used in a way no layer rule covers: "
            "their gradients were formed one sample at a time, which is exact but slower",
            GenericPathWarning,
            stacklevel=stacklevel,
        )


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
        processes: those it is split over, from :func:`flatminima.sharding.processes_of`.

    Raises:
        FlatminimaError: if there is none.
        NonFiniteError: if a parameter holds NaN or infinity; names it.
    """
    processes.attempt(lambda: _refuse_non_finite_parameters(model))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise FlatminimaError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad on those that the measure is over"
        )
    return parts_of(model, parameters, processes)


def _refuse_non_finite_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not shard_of(parameter).isfinite().all():
            raise NonFiniteError(
                f"NaN or infinity in parameter {name!r}: the checkpoint is broken or training diverged; load another"
            )


class _Accumulator:
    """ξ̂ as it grows, parameter by parameter; this process's part of it until :meth:`add_up`.

    Attributes:
        unit: (N', N') float64, the sum so far.
        loss: (N',) float64, of the samples noted so far.
        log_scale: (N',) float64, the logarithms of the norms of their gradients at the logits.
        shares: each parameter's own part by name, if asked for.
    """

    def __init__(self, n: int, parts: Mapping[str, Part], *, scale_invariant: bool, shares: bool) -> None:
        device = next(iter(parts.values())).parameter.device
        self.names = {id(part.parameter): name for name, part in parts.items()}
        self.parts = {id(part.parameter): part for part in parts.values()}
        self.scale_invariant = scale_invariant
        self.unit = torch.zeros(n, n, dtype=torch.float64, device=float64_device(device))
        self.loss, self.log_scale = self.unit.new_zeros(n), self.unit.new_zeros(n)
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
            self._add(parameter, use.product(grad, part.start, part.stop).to(self.unit.device))  # type: ignore[misc]
            return
        for start, stop in _slices(parameter, len(self), part.start, part.stop):
            rows = _summed_rows(uses, start, stop)
            if rows is not None:
                self.add_rows(parameter, rows, start, stop)

    def add_up(self, processes: Processes) -> None:
        """Sum over processes that formed the rows of different parts."""
        for part in (self.unit, *(self.shares or {}).values()):
            processes.add_up(part)

    def _add(self, parameter: nn.Parameter, product: Tensor) -> None:
        self.unit += product
        if self.shares is not None:
            self.shares[self.names[id(parameter)]] += product


@dataclass(frozen=True)
class _Batch:
    """The samples of one ξ, and what is differentiated at them.

    The loss's gradient at the logits is formed anew wherever it is needed: a language model's, kept for all samples,
    would be larger than most other things.
    """

    model: nn.Module
    inputs: Inputs
    targets: Tensor
    loss: Loss | FactoredLoss
    logit_normalization: float | None

    def logits(self, rows: slice) -> Tensor:
        return call_model(self.model, take(self.inputs, rows))

    def gradient_at(self, logits: Tensor, rows: slice) -> LogitGradient:
        return logit_gradient(self.loss, logits, self.targets[rows], logit_normalization=self.logit_normalization)


def _add_by_rules(
    xi: _Accumulator, batch: _Batch, parts: Mapping[str, Part], plan: Plan
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Add JJᵀ of every parameter that rules cover.

    Returns:
        The parameters that were given up, and those that no call showed.
    """
    given_up: dict[str, nn.Parameter] = {}
    unseen: dict[str, nn.Parameter] = {}
    with frozen([p for p in batch.model.parameters() if p.requires_grad]):
        for pieces in plan.passes:
            wanted = {piece.name: parts[piece.name].parameter for piece in pieces}
            sink: _Accumulator | _Rows = xi if plan.at_once else _Rows(plan.samples, pieces, parts)
            for start in range(0, plan.samples, plan.chunk):
                rows = slice(start, min(start + plan.chunk, plan.samples))
                recorder = Recorder(rows.stop - start, wanted)
                logits = recorder.run(batch.model, take(batch.inputs, rows))
                delta = batch.gradient_at(logits, rows)
                xi.note(rows, delta)
                given_up |= recorder.given_up_parameters()
                unseen |= recorder.unseen_parameters()
                if isinstance(sink, _Rows):
                    sink.samples = rows
                _backward(logits, delta.direction, recorder, sink)
                del logits, delta, recorder
            if isinstance(sink, _Rows):
                sink.add_to(xi, {id(p) for p in given_up.values()})
    reshard(batch.model)  # else what FSDP2 still holds gathered would stay frozen
    return given_up, {name: p for name, p in unseen.items() if name not in given_up}


class _Rows:
    """The rows of J of some pieces of parameters, filled chunk by chunk of samples and then multiplied out."""

    def __init__(self, samples: int, pieces: Sequence[Piece], parts: Mapping[str, Part]) -> None:
        self.total = samples
        self.samples = slice(0, 0)
        self.pieces: dict[int, list[tuple[int, int]]] = {}
        for piece in pieces:
            part = parts[piece.name]
            slices = _slices(part.parameter, samples, *part.range(piece.start, piece.stop))
            self.pieces.setdefault(id(part.parameter), []).extend(slices)
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

    def add_to(self, xi: _Accumulator, left_out: set[int]) -> None:
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


def _backward(logits: Tensor, direction: Tensor, recorder: Recorder, sink: _Accumulator | _Rows) -> None:
    """Back-propagate ``direction`` through activations only; hand every covered parameter's uses to ``sink``."""

    def add_when_complete(parameter: nn.Parameter, uses: list[RecordedUse]) -> Callable[[], None]:
        def on_arrival() -> None:
            if all(use.grad is not None for use in uses):
                sink.add_use(parameter, uses)
                for use in uses:  # the graph's hooks keep them alive, and would keep activations and gradients too
                    del use.grad, use.use
                uses.clear()

        return on_arrival

    covered = list(recorder.covered_uses())
    for parameter, uses in covered:
        for use in uses:
            use.on_arrival = add_when_complete(parameter, uses)
    if logits.requires_grad:
        torch.autograd.grad(logits, recorder.root, direction)
    for parameter, uses in covered:  # what is left has a use on a branch that no gradient reaches
        sink.add_use(parameter, uses)


def _slices(parameter: nn.Parameter, n: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``parameter[start:stop]``'s first dimension whose rows for n samples fit the budget."""
    step = _slice_length(n * row_bytes(parameter), parameter.device)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _slice_length(row: int, device: torch.device) -> int:
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


def _used(batch: _Batch, candidates: Mapping[str, nn.Parameter], chunk: int) -> dict[str, nn.Parameter]:
    """Those candidates that plain autograd finds in the graph of some chunk of samples."""
    found: dict[str, nn.Parameter] = {}
    for start in range(0, len(batch.targets), chunk):
        rows = slice(start, start + chunk)
        logits = batch.logits(rows)
        if logits.requires_grad:
            direction = batch.gradient_at(logits, rows).direction
            grads = torch.autograd.grad(logits, list(candidates.values()), direction, allow_unused=True)
            found |= {name: p for (name, p), grad in zip(candidates.items(), grads, strict=True) if grad is not None}
    return found


def _add_one_by_one(xi: _Accumulator, batch: _Batch, parts: Mapping[str, Part]) -> None:
    """Add JJᵀ of ``parts`` by plain autograd, sample by sample, as many at once as the budget holds."""
    for group in _groups(parts.values(), len(xi)):
        _add_gradients(xi, group, [_gradients(batch, i, group) for i in range(len(xi))])


def _add_with_batch_statistics(xi: _Accumulator, batch: _Batch, parts: Mapping[str, Part], chunk: int) -> None:
    """Add JJᵀ where a sample's loss depends on its whole chunk: one backward pass per sample through the chunk."""
    if chunk < 2 or len(xi) % chunk:
        raise FlatminimaError(
            f"batchnorm={chunk} cannot be used with {len(xi)} samples: it must be at least 2 and divide the subset_size"
        )
    for group in _groups(parts.values(), len(xi)):
        gradients = []
        for start in range(0, len(xi), chunk):
            rows = slice(start, start + chunk)
            logits = batch.logits(rows)
            delta = batch.gradient_at(logits, rows)
            xi.note(rows, delta)
            for i in range(chunk):
                one = torch.zeros_like(logits)
                one[i] = delta.direction[i]
                gradients.append(_gradient_of(logits, one, group, keep=i + 1 < chunk))
        _add_gradients(xi, group, gradients)


def _add_gradients(xi: _Accumulator, group: _Group, gradients: Sequence[Sequence[Tensor]]) -> None:
    for (parameter, start, stop), rows in zip(group, zip(*gradients, strict=True), strict=True):
        xi.add_rows(parameter, torch.stack(rows), start, stop)


@contextlib.contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalizes by the batch and leaves its running statistics alone; all else stays in eval mode."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, tracked in zip(layers, tracking, strict=True):
            layer.training, layer.track_running_stats = False, tracked


def _groups(parts: Iterable[Part], n: int) -> Iterator[_Group]:
    """Consecutive slices of the parts whose rows for n samples fit the budget together.

    Every process has as many groups, as each takes passes through the model: shorter parts end in empty slices.
    """
    group: _Group = []
    left = ROWS_BUDGET_BYTES
    for part in parts:
        for start, stop in _slices(part.parameter, n, 0, part.longest):
            size = (stop - start) * n * row_bytes(part.parameter)
            if group and size > left:
                yield group
                group, left = [], ROWS_BUDGET_BYTES
            group.append((part.parameter, *part.range(start, stop)))
            left -= size
    if group:
        yield group


def _gradients(batch: _Batch, sample: int, group: _Group) -> list[Tensor]:
    """One row of J over a group of slices, by plain autograd on that sample alone."""
    one = slice(sample, sample + 1)
    logits = batch.logits(one)
    return _gradient_of(logits, batch.gradient_at(logits, one).direction, group)


def _gradient_of(logits: Tensor, direction: Tensor, group: _Group, *, keep: bool = False) -> list[Tensor]:
    parameters = [parameter for parameter, _, _ in group]
    whole = torch.autograd.grad(
        logits, parameters, direction, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    # Copied, so that a slice does not keep the whole gradient.
    return [_at_least_1d(g)[start:stop].clone() for (_, start, stop), g in zip(group, whole, strict=True)]


def _check_against_autograd(
    xi: _Accumulator, batch: _Batch, parts: Mapping[str, Part], processes: Processes, tolerance: float
) -> None:
    """Compare the entries of the first and the last sample with plain autograd on each alone."""
    samples = sorted({0, len(xi) - 1})
    expected = _Accumulator(len(samples), parts, scale_invariant=xi.scale_invariant, shares=False)
    for group in _groups(parts.values(), len(samples)):
        _add_gradients(expected, group, [_gradients(batch, i, group) for i in samples])
    expected.add_up(processes)
    norms = expected.unit.diagonal().sqrt()
    difference = (xi.unit[samples][:, samples] - expected.unit).abs()
    error = (difference / (norms[:, None] * norms).clamp_min(1e-300)).max().item()
    if not error <= tolerance:
        raise WrongGradientError(
            f"gradients of samples {samples} in the batch differ from plain autograd on each alone by {error:.1e} "
            f"(relative, allowed {tolerance:.0e}): samples interact, or are not the model's first dimension throughout"
        )


def _at_least_1d(values: Tensor) -> Tensor:
    """A scalar parameter as one of a single entry."""
    return values if values.dim() else values.unsqueeze(0)


def _sums(batch: tuple[Inputs, Tensor]) -> list[list[float]]:
    """What tells batches apart: the sum of every sample's values, for each tensor."""
    return [in_float64(tensor).reshape(len(tensor), -1).sum(1).tolist() for tensor in tensors_of(batch)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a compiled or data-parallel one: the wrappers hide its calls, or split its batch."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrapped(compiled) if isinstance(compiled, nn.Module) else model


def _common_dtype(parts: Mapping[str, Part]) -> torch.dtype:
    dtypes = {part.parameter.dtype for part in parts.values()}
    if len(dtypes) > 1 or not dtypes <= set(SPOT_CHECK_TOLERANCE):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise FlatminimaError(
            f"parameters are {names}: measure in one of float32 and float64 (copy.deepcopy(model).float())"
        )
    return dtypes.pop()
