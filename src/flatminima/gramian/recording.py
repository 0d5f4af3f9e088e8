"""Watches a forward pass call by call and keeps every use of every trainable parameter, for its layer rule.

Calls are seen by a ``TorchFunctionMode``, so it does not matter which module makes them, or whether one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from flatminima.errors import FlatminimaError
from flatminima.gramian.planning import first_dimension
from flatminima.gramian.rules import EXTRACTS, RULES, SPLITS, ParameterUse
from flatminima.network import Inputs, call_model, tensors_of
from flatminima.parallel import fsdp_modules


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
class RecordedUse:
    """One use of a parameter, waiting for the gradient at its output."""

    use: ParameterUse
    version: int  # of the activation that the rule will read
    grad: Tensor | None = None
    on_arrival: Callable[[], None] = lambda: None

    def arrive(self, grad: Tensor) -> None:
        """Take the gradient, unless the activation that the rule needs with it is gone."""
        if self.use.reads is not None and self.use.reads._version != self.version:
            raise FlatminimaError(
                f"the input of a layer (shape {tuple(self.use.reads.shape)}) was overwritten in place after the layer "
                "read it: its gradient is lost; replace the in-place operation in the model's forward"
            )
        self.grad = grad
        self.on_arrival()


@dataclass(frozen=True)
class _Extract:
    """Entries of one parameter, taken without looking at the samples; its rows of J go back to where they came from.

    Attributes:
        tensor: the entries.
        version: of the tensor; overwritten in place, it is no longer what it was.
        parameter: the parameter.
        put_back: ``put_back(rows)``: rows of J for the tensor, (N, ...) → rows for the parameter.
    """

    tensor: Tensor
    version: int
    parameter: Tensor
    put_back: Callable[[Tensor], Tensor]

    def use_of_parameter(self, use: ParameterUse) -> ParameterUse:
        """A use of the tensor as one of the parameter."""

        def rows(grad: Tensor, start: int, stop: int) -> Tensor:
            return self.put_back(use.rows(grad, 0, first_dimension(self.tensor)))[:, start:stop]

        return ParameterUse(self.parameter, rows, use.reads)


class Recorder(TorchFunctionMode):
    """Watches a forward pass call by call and keeps, for every trainable parameter, its uses.

    A use is recorded if a rule covers the call, the call depends on the samples (one of its arguments was computed from
    the inputs), and its output keeps the samples as its first dimension. A parameter in any other call that returns a
    new tensor is given up on: the generic path takes all of it.
    """

    def __init__(self, n: int, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.n = n
        self.parameters = parameters
        self.uses: dict[int, list[RecordedUse]] = {id(p): [] for p in parameters.values()}
        self.given_up: set[int] = set()
        self.extracts: dict[int, _Extract] = {}
        self.of_samples: Any = WeakIdKeyDictionary()  # the tensors computed from the inputs
        device = next(iter(parameters.values())).device
        self.root = torch.zeros((), device=device, requires_grad=True)

    def run(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The model's logits; fills ``uses``."""
        self._mark(tensors_of(inputs))
        with self, following_inputs(model, self._follow):
            logits = call_model(model, inputs)
        if logits.shape[:1] != (self.n,):
            raise FlatminimaError(
                f"the model returned shape {tuple(logits.shape)} for {self.n} samples: "
                "its first dimension must be the samples"
            )
        return logits

    def given_up_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters with a use that no rule covers."""
        return {name: p for name, p in self.parameters.items() if id(p) in self.given_up}

    def unseen_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters in no recorded call: unused, or used where calls cannot be seen (custom operations, scripts)."""
        return {name: p for name, p in self.parameters.items() if id(p) not in self.given_up and not self.uses[id(p)]}

    def covered_uses(self) -> Iterator[tuple[nn.Parameter, list[RecordedUse]]]:
        """Parameters whose every use has a rule, with those uses."""
        for parameter in self.parameters.values():
            if id(parameter) not in self.given_up and self.uses[id(parameter)]:
                yield parameter, self.uses[id(parameter)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = tensors_of((args, kwargs))
        touched = {id(tensor) for tensor in arguments if id(tensor) in self.uses or id(tensor) in self.extracts}
        if touched and func in SPLITS:
            with self:
                output = SPLITS[func](*args, **kwargs)
            if output is not None:
                return output
        of_samples = any(tensor in self.of_samples for tensor in arguments)
        if func is F.embedding and touched and not of_samples and args[0].dim() > 1:
            args, of_samples = self._position_look_up(args)
        output = func(*args, **kwargs)
        if touched and not of_samples and (extract := self._extract(func, args, kwargs, output)) is not None:
            self.extracts[id(output)] = extract
            return output
        if touched and any(id(tensor) not in touched for tensor in tensors_of(output)):
            output, recorded = self._record(func, args, kwargs, output, touched, of_samples)
            of_samples = of_samples or recorded
        if of_samples:
            self._mark(tensors_of(args[:1] if output is None else output))  # x[i] = y returns nothing and writes to x
        return output

    def _position_look_up(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool]:
        """Indices that were not computed from the inputs (positions, segments), and whether there is a row per sample.

        A single row, which broadcasting would hand to every sample, is repeated for each of them.
        """
        indices = args[0]
        if indices.shape[0] == 1:
            return (indices.expand(self.n, *indices.shape[1:]), *args[1:]), True
        return args, indices.shape[0] == self.n

    def _extract(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> _Extract | None:
        """The output as entries of one parameter, if that is what it is."""
        taken = EXTRACTS[func](*args, **kwargs) if func in EXTRACTS and torch.is_grad_enabled() else None
        if taken is None or id(taken[0]) in self._overwritten():
            return None
        source, put_back = taken
        if id(source) not in self.extracts:
            return _Extract(output, output._version, source, put_back)
        outer = self.extracts[id(source)]
        return _Extract(output, output._version, outer.parameter, lambda rows: outer.put_back(put_back(rows)))

    def _follow(self, tensor: Tensor, other: Tensor) -> None:
        if tensor in self.of_samples:
            self._mark([other])

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
        covered = {id(use.parameter) for use in uses} - self._overwritten()
        self.given_up |= {self._owner(tensor) for tensor in touched - covered}
        if not touched & covered:
            return output, False
        output = self._tap(output)
        for use in uses:
            if id(use.parameter) in touched & covered:
                if id(use.parameter) in self.extracts:
                    use = self.extracts[id(use.parameter)].use_of_parameter(use)
                recorded = RecordedUse(use, use.reads._version if use.reads is not None else 0)
                # Hooked now, not after the forward pass: a later in-place operation would make it another tensor.
                output.register_hook(recorded.arrive)
                self.uses[id(use.parameter)].append(recorded)
        return output, True

    def _overwritten(self) -> set[int]:
        """Extracts that an in-place operation has made something else."""
        return {tensor for tensor, extract in self.extracts.items() if extract.tensor._version != extract.version}

    def _owner(self, tensor: int) -> int:
        return id(self.extracts[tensor].parameter) if tensor in self.extracts else tensor

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
