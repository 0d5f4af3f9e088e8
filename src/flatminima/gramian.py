"""What: a model, a loss and N' samples → ξ = JJᵀ, one parameter at a time. J itself never exists.

ξ is additive over parameters, ξ = Σ_p J_p J_pᵀ, so one forward and one backward pass are enough: the forward pass
records every use of every trainable parameter (:class:`_Recorder`), and the backward pass, which computes gradients of
activations only, hands each use its output gradient (:class:`_Accumulator`), forms that parameter's rows, adds
their product to ξ and frees them. Parameters without a layer rule are differentiated one sample at a time instead.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from flatminima.batching import Inputs, batch_size, call_model, evaluating, map_tensors, take, tensors_of
from flatminima.errors import FlatminimaError, GenericPathWarning, NonFiniteError, WrongGradientError
from flatminima.layer_rules import RULES, ParameterUse
from flatminima.losses import Loss, logit_gradient, refuse_non_finite
from flatminima.precision import true_precision

ROWS_BUDGET_BYTES = 256 * 2**20
"""Rows of J held at once. A larger parameter is taken in slices of its first dimension."""

SPOT_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Allowed difference between the checked entries of ξ and plain autograd, relative to the gradients' norms."""


@dataclass(frozen=True)
class FactoredGram:
    """ξ in factored form: ξ_ij = exp(log_scale_i + log_scale_j) · unit_ij.

    Attributes:
        unit: (N', N') float64, the Gram matrix of the gradients with the logits' gradient scaled to norm one.
        log_scale: (N',) float64, the logarithms of the logits' gradients' norms.
        loss: (N',) float64, the per-sample losses.
        generic_parameters: names of the parameters that took the generic path.
        dtype: the network's floating-point type, which limits the accuracy of ``unit``.
    """

    unit: Tensor
    log_scale: Tensor
    loss: Tensor
    generic_parameters: tuple[str, ...]
    dtype: torch.dtype

    def matrix(self) -> Tensor:
        """ξ itself, (N', N') float64. Entries below 1e-308 underflow to zero; the factored form never does."""
        scale = self.log_scale.exp()
        return self.unit * scale[:, None] * scale


def gram(model: nn.Module, inputs: Inputs, targets: Tensor, *, loss: Loss = "cross_entropy") -> Tensor:
    """ξ = JJᵀ, the Gram matrix of per-sample loss gradients over all trainable parameters (Jia & Su, Eq. 4–5).

    The model is run in eval mode (BatchNorm by its running statistics, no dropout) and left as it was found.

    Args:
        model: any module; its output is the logits, or an object with ``.logits``.
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
    warn_generic(result)
    return result.matrix()


def factored_gram(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    *,
    loss: Loss = "cross_entropy",
    logit_normalization: float | None = None,
    spot_check: bool = True,
) -> FactoredGram:
    """ξ in factored form.

    Arguments and errors as for :func:`gram` and, for ``logit_normalization``,
    :func:`flatminima.losses.logit_gradient`; ``spot_check`` compares two rows with plain autograd.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled module hides its calls; the module inside does not
    inputs = map_tensors(torch.Tensor.detach, inputs)
    n = batch_size((inputs, targets))
    parameters = trainable_parameters(model)
    dtype = _common_dtype(parameters)
    with evaluating(model), true_precision(), torch.enable_grad():
        with _frozen(parameters.values()):
            recorder = _Recorder(n, parameters)
            logits = recorder.run(model, inputs)
            delta = logit_gradient(loss, logits, targets, logit_normalization=logit_normalization)
            direction = delta.direction.to(logits.dtype)
            unit = torch.zeros(n, n, dtype=torch.float64, device=logits.device)
            generic, unseen = recorder.given_up_parameters(), recorder.unseen_parameters()
            _accumulate(unit, logits, direction, recorder)
            del logits
        if unseen:
            generic |= _used(model, inputs, direction, unseen)
        _add_generic(unit, model, inputs, direction, generic)
        if spot_check:
            _check_against_autograd(unit, model, inputs, direction, parameters, SPOT_CHECK_TOLERANCE[dtype])
    refuse_non_finite("gradients", unit)
    return FactoredGram(unit, delta.log_norm, delta.loss, tuple(generic), dtype)


def warn_generic(result: FactoredGram) -> None:
    """Say by a :class:`GenericPathWarning` which parameters had no layer rule, if any."""
    names = result.generic_parameters
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        warnings.warn(
            f"{len(names)} parameters ({shown}) are used in a way no layer rule covers: "
            "their gradients were formed one sample at a time, which is exact but slower",
            GenericPathWarning,
            stacklevel=3,
        )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; tied ones once.

    Raises:
        FlatminimaError: if there is none.
        NonFiniteError: if one holds NaN or infinity; names it.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise FlatminimaError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad on those that the measure is over"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(
                f"NaN or infinity in parameter {name!r}: the checkpoint is broken or training diverged; load another"
            )
    return parameters


class _Tap(torch.autograd.Function):
    """Lets a tensor that no gradient would reach carry one, in place: identity forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_zeros(())


@dataclass
class _RecordedUse:
    """One use of a parameter, waiting for the gradient at its output."""

    use: ParameterUse
    version: int  # of the activation that the rule will read
    grad: Tensor | None = None
    on_arrival: Callable[[], None] = lambda: None

    def arrive(self, grad: Tensor) -> None:
        if self.use.reads is not None and self.use.reads._version != self.version:
            raise FlatminimaError(
                f"the input of a layer (shape {tuple(self.use.reads.shape)}) was overwritten in place after the layer "
                "read it: its gradient is lost; replace the in-place operation in the model's forward"
            )
        self.grad = grad
        self.on_arrival()


class _Recorder(TorchFunctionMode):
    """Watches a forward pass call by call and keeps, for every trainable parameter, its uses.

    A use is recorded if a rule covers the call, the call depends on the samples (one of its arguments was computed from
    the inputs), and its output keeps the samples as its first dimension. A parameter in any other call that returns a
    new tensor is given up on: the generic path takes all of it.
    """

    def __init__(self, n: int, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.n = n
        self.parameters = parameters
        self.uses: dict[int, list[_RecordedUse]] = {id(p): [] for p in parameters.values()}
        self.given_up: set[int] = set()
        self.of_samples: Any = WeakIdKeyDictionary()  # the tensors computed from the inputs
        device = next(iter(parameters.values())).device
        self.root = torch.zeros((), device=device, requires_grad=True)

    def run(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The model's logits; fills ``uses``."""
        self._mark(tensors_of(inputs))
        with self:
            logits = call_model(model, inputs)
        if logits.shape[:1] != (self.n,):
            raise FlatminimaError(
                f"the model returned shape {tuple(logits.shape)} for {self.n} samples: "
                "its first dimension must be the samples"
            )
        return logits

    def given_up_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if id(p) in self.given_up}

    def unseen_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters in no recorded call: unused, or used where calls cannot be seen (custom operations, scripts)."""
        return {name: p for name, p in self.parameters.items() if id(p) not in self.given_up and not self.uses[id(p)]}

    def covered_uses(self) -> Iterator[tuple[nn.Parameter, list[_RecordedUse]]]:
        for parameter in self.parameters.values():
            if id(parameter) not in self.given_up and self.uses[id(parameter)]:
                yield parameter, self.uses[id(parameter)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = tensors_of((args, kwargs))
        touched = {id(tensor) for tensor in arguments if id(tensor) in self.uses}
        of_samples = any(tensor in self.of_samples for tensor in arguments)
        if func is F.embedding and touched and not of_samples and self._shared_by_samples(args[0]):
            args = (args[0].expand(self.n, *args[0].shape[1:]), *args[1:])
            of_samples = True
        output = func(*args, **kwargs)
        if touched and any(id(tensor) not in touched for tensor in tensors_of(output)):
            output, recorded = self._record(func, args, kwargs, output, touched, of_samples)
            of_samples = of_samples or recorded
        if of_samples:
            self._mark(tensors_of(args[:1] if output is None else output))  # x[i] = y returns nothing and writes to x
        return output

    def _shared_by_samples(self, indices: Tensor) -> bool:
        """Position indices of shape (1, T): one look-up that broadcasting hands to every sample."""
        return indices.dim() > 1 and indices.shape[0] == 1

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.of_samples[tensor] = True

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        touched: set[int],
        of_samples: bool,
    ) -> tuple[Any, bool]:
        """Record the call's uses, or give its parameters up. Returns the output to go on with, and which it was."""
        uses = self._uses(func, args, kwargs, output, of_samples)
        covered = {id(use.parameter) for use in uses}
        self.given_up |= touched - covered
        if not touched & covered:
            return output, False
        output = self._tap(output)
        for use in uses:
            if id(use.parameter) in touched:
                recorded = _RecordedUse(use, use.reads._version if use.reads is not None else 0)
                # Hooked now, not after the forward pass: a later in-place operation would make it another tensor.
                output.register_hook(recorded.arrive)
                self.uses[id(use.parameter)].append(recorded)
        return output, True

    def _uses(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, of_samples: bool
    ) -> list[ParameterUse]:
        rule = RULES.get(func)
        if rule is None or not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return []
        if not (of_samples or func is torch.Tensor.expand) or output.dim() == 0 or output.shape[0] % self.n:
            return []
        written_in_place = any(output is argument for argument in args)
        if written_in_place and not output.requires_grad:
            return []
        with torch.no_grad():
            return rule(self.n, *args, **kwargs) or []

    def _tap(self, output: Tensor) -> Tensor:
        if output.requires_grad:
            return output
        if output._is_view():
            output = output.clone()  # marking a view as written would mark the tensor it shows
        return _Tap.apply(output, self.root)  # type: ignore[no-any-return, no-untyped-call]


def _accumulate(unit: Tensor, logits: Tensor, direction: Tensor, recorder: _Recorder) -> None:
    """Back-propagate ``direction`` through activations only; add JJᵀ of every covered parameter to ``unit``."""

    def add_when_complete(parameter: nn.Parameter, uses: list[_RecordedUse]) -> Callable[[], None]:
        def on_arrival() -> None:
            if all(use.grad is not None for use in uses):
                _add_parameter(unit, parameter, uses)
                uses.clear()

        return on_arrival

    covered = list(recorder.covered_uses())
    for parameter, uses in covered:
        for use in uses:
            use.on_arrival = add_when_complete(parameter, uses)
    if logits.requires_grad:
        torch.autograd.grad(logits, recorder.root, direction)
    for parameter, uses in covered:  # what is left has a use on a branch that no gradient reaches
        _add_parameter(unit, parameter, uses)


def _add_parameter(unit: Tensor, parameter: nn.Parameter, uses: list[_RecordedUse]) -> None:
    """Add one parameter's JJᵀ; the rows of several uses (tied or reused parameters) are summed before the product."""
    arrived = [(use.use, use.grad) for use in uses if use.grad is not None]
    if len(arrived) == 1 and arrived[0][0].product is not None:
        use, grad = arrived[0]
        unit += use.product(grad)  # type: ignore[misc]
        return
    for start, stop in _slices(parameter, len(unit)):
        rows: Tensor | None = None
        for use, grad in arrived:
            part = use.rows(grad, start, stop)
            rows = part if rows is None else rows + part
        if rows is not None:
            _add_product(unit, rows)


def _slices(parameter: nn.Parameter, n: int) -> Iterator[tuple[int, int]]:
    """Ranges of the parameter's first dimension whose rows fit the budget."""
    length = parameter.shape[0] if parameter.dim() else 1
    row_bytes = n * (parameter.numel() // max(length, 1)) * parameter.element_size()
    step = max(1, min(length, ROWS_BUDGET_BYTES // max(row_bytes, 1)))
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _add_product(unit: Tensor, rows: Tensor) -> None:
    """``unit += rows rowsᵀ`` for rows in any memory layout, without copying them into another one.

    Products are in the rows' precision, their sum over blocks and parameters in float64: products in float64 too move
    ln det ξ by less than 1e-5, a hundredth of what the float32 rows themselves err by.
    """
    n = rows.shape[0]
    outer = [d for d in range(1, rows.dim()) if rows.stride(d) > rows.stride(0)]
    inner = [d for d in range(1, rows.dim()) if d not in outer]
    for block in rows.permute(*outer, 0, *inner).reshape(math.prod(rows.shape[d] for d in outer), n, -1):
        unit += block @ block.T


def _used(
    model: nn.Module, inputs: Inputs, direction: Tensor, candidates: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Those candidates that plain autograd finds in the graph of the whole batch."""
    logits = call_model(model, inputs)
    if not logits.requires_grad:
        return {}
    grads = torch.autograd.grad(logits, list(candidates.values()), direction, allow_unused=True)
    return {name: p for (name, p), grad in zip(candidates.items(), grads, strict=True) if grad is not None}


def _add_generic(
    unit: Tensor, model: nn.Module, inputs: Inputs, direction: Tensor, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Add JJᵀ of ``parameters`` by plain autograd, sample by sample, as many at once as the budget holds."""
    n = len(unit)
    for group in _groups(parameters.values(), ROWS_BUDGET_BYTES // n):
        rows = torch.stack([_gradient(model, inputs, direction, i, group) for i in range(n)])
        _add_product(unit, rows)


def _groups(parameters: Iterable[nn.Parameter], budget_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of at most ``budget_bytes`` together (a larger one stands alone)."""
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.element_size()
        if group and size + nbytes > budget_bytes:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += nbytes
    if group:
        yield group


def _gradient(
    model: nn.Module, inputs: Inputs, direction: Tensor, sample: int, parameters: Sequence[nn.Parameter]
) -> Tensor:
    """One row of J over ``parameters``, flat, by plain autograd on that sample alone."""
    one = slice(sample, sample + 1)
    logits = call_model(model, take(inputs, one))
    grads = torch.autograd.grad(logits, parameters, direction[one], allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def _check_against_autograd(
    unit: Tensor,
    model: nn.Module,
    inputs: Inputs,
    direction: Tensor,
    parameters: Mapping[str, nn.Parameter],
    tolerance: float,
) -> None:
    """Compare the entries of the first and the last sample with plain autograd on each alone."""
    samples = sorted({0, len(unit) - 1})
    rows = torch.stack([_gradient(model, inputs, direction, i, list(parameters.values())) for i in samples]).double()
    expected = rows @ rows.T
    norms = expected.diagonal().sqrt()
    error = ((unit[samples][:, samples] - expected).abs() / (norms[:, None] * norms).clamp_min(1e-300)).max().item()
    if not error <= tolerance:
        raise WrongGradientError(
            f"gradients of samples {samples} in the batch differ from plain autograd on each alone by {error:.1e} "
            f"(relative, allowed {tolerance:.0e}): samples interact, or are not the model's first dimension throughout"
        )


def _common_dtype(parameters: Mapping[str, nn.Parameter]) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) > 1 or not dtypes <= set(SPOT_CHECK_TOLERANCE):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise FlatminimaError(
            f"parameters are {names}: measure in one of float32 and float64 (copy.deepcopy(model).float())"
        )
    return dtypes.pop()


@contextlib.contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for the parameters themselves: the backward pass then computes those of activations only."""
    frozen = list(parameters)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
