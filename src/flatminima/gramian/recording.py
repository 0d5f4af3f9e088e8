"""Watches a forward pass call by call and keeps every use of every trainable parameter, for its layer rule.

Calls are seen by a ``TorchFunctionMode``, so it does not matter which module makes them, or whether one does.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flatminima.errors import FlatminimaError
from flatminima.gramian.following import follow
from flatminima.gramian.layouts import LOST, Call, Layout
from flatminima.gramian.planning import first_dimension
from flatminima.gramian.rules import EXTRACTS, POSITIONWISE, RULES, SPLITS, ParameterUse, Rule
from flatminima.network import Inputs, call_model, tensors_of
from flatminima.parallel import fsdp_modules
from flatminima.torch_compat import base_of, is_view, make_dual, version_of

_DERIVATIVES = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward, make_dual})
"""The functions by which all derivatives are taken, those of ``torch.func`` too."""


class DerivativeInForwardError(Exception):
    """The model takes derivatives in its forward pass, through which parameters act where no call shows them."""


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
        if self.use.reads is not None and version_of(self.use.reads) != self.version:
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

    A use is recorded if a rule covers the call, and the samples are the first dimension of its output
    (:mod:`~flatminima.gramian.following`). A parameter in any other call that returns or writes to another tensor is
    given up on: the generic path takes all of it.

    Attributes:
        root: what all recorded outputs depend on, and so carry gradients.
        leaves: whatever else in the forward pass was made to require gradients.
        signature: tells sequences of calls and shapes apart.
        guessed: whether it was only likely, somewhere, where the samples lie.
    """

    def __init__(self, n: int, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.n = n
        self.parameters = parameters
        self.uses: dict[int, list[RecordedUse]] = {id(p): [] for p in parameters.values()}
        self.given_up: set[int] = set()
        self.extracts: dict[int, _Extract] = {}
        self.signature, self.guessed = 0, False
        self._layouts: dict[int, tuple[weakref.ref[Tensor], Layout]] = {}  # of the tensors computed from the inputs
        device = next(iter(parameters.values())).device
        self.root = torch.zeros((), device=device, requires_grad=True)
        self.leaves: dict[int, Tensor] = {}

    def run(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The model's logits; fills ``uses``.

        Raises:
            DerivativeInForwardError: if the forward pass takes derivatives.
            FlatminimaError: if the output's first dimension is not the samples.
        """
        for tensor in tensors_of(inputs):
            self._mark(tensor, Layout(0))
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
        if func in _DERIVATIVES:
            raise DerivativeInForwardError
        arguments = _tensors_among(args, kwargs)
        self.leaves |= {id(tensor): tensor for tensor in arguments if tensor.requires_grad and tensor.is_leaf}
        touched = {id(tensor) for tensor in arguments if id(tensor) in self.uses or id(tensor) in self.extracts}
        if touched and func in SPLITS:
            with self:
                output = SPLITS[func](*args, **kwargs)
            if output is not None:
                return output
        of_samples = [(tensor, layout) for tensor in arguments if (layout := self._layout(tensor)) is not None]
        output = func(*args, **kwargs)
        self.signature = hash((self.signature, func, output.shape if isinstance(output, Tensor) else None))
        if touched and not of_samples and (extract := self._extract(func, args, kwargs, output)) is not None:
            self.extracts[id(output)] = extract
            return output
        layouts = self._follow_call(func, args, kwargs, output, of_samples) if of_samples else None
        if touched and _goes_on(func, output, touched):
            output, layouts = self._record(func, args, kwargs, output, touched, layouts)
        if layouts is not None:
            written = tensors_of(args[:1] if output is None else output)  # x[i] = y returns nothing and writes to x
            for tensor, layout in zip(written, layouts, strict=False):
                self._mark(tensor, layout)
            if written and any(written[0] is argument for argument in arguments):
                self._mark_shown(written[0])
        return output

    def _follow_call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        of_samples: list[tuple[Tensor, Layout]],
    ) -> list[Layout] | None:
        """The layouts of what the call returns or writes to; None where that is not computed from the inputs."""
        if not (isinstance(output, (Tensor, tuple, list, dict)) or output is None) or isinstance(output, torch.Size):
            return None
        if self.n == 1:  # all of it is the one sample's
            return [Layout(0)] * len(tensors_of(args[:1] if output is None else output))
        call = Call(self.n, func, args, kwargs, output, self.layout_of, of_samples)
        layouts = follow(call)
        self.guessed |= call.guessed
        self.given_up |= call.refuted
        return layouts

    def layout_of(self, tensor: Any) -> Layout | None:
        """Where the samples lie in a tensor of this forward pass; None if it was not computed from the inputs."""
        found = self._layouts.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _layout(self, tensor: Tensor) -> Layout | None:
        """Where the samples lie in a tensor that was computed from the inputs; None for any other."""
        if (marked := self.layout_of(tensor)) is not None:
            return marked
        if tensor.requires_grad and not tensor.is_leaf:
            # Only what was computed from the inputs requires a gradient here: a call that cannot be seen returned it.
            layout = Layout(0) if tensor.dim() and tensor.shape[0] == self.n else LOST
            self.guessed |= layout is not LOST
            self._mark(tensor, layout)
            return layout
        return None

    def _mark(self, tensor: Tensor, layout: Layout) -> None:
        self._layouts[id(tensor)] = weakref.ref(tensor), layout

    def _mark_shown(self, written: Tensor) -> None:
        """Something computed from the inputs was written into a view: it is in the tensor that the view shows, too."""
        base = base_of(written)
        if base is not None and self._layout(base) is None:
            samples = base.dim() > 0 and base.shape[0] % self.n == 0
            self.guessed |= samples
            self._mark(base, Layout(0, 1, base.shape[0] // self.n) if samples else LOST)

    def _follow(self, tensor: Tensor, other: Tensor) -> None:
        if (layout := self._layout(tensor)) is not None:
            self._mark(other, layout)

    def _extract(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> _Extract | None:
        """The output as entries of one parameter, if that is what it is."""
        if func not in EXTRACTS or not torch.is_grad_enabled() or not _takes(EXTRACTS[func], args, kwargs):
            return None
        if self._one_for_each_sample(func, args, kwargs, output, set()):
            return None
        taken = EXTRACTS[func](*args, **kwargs)
        if taken is None or id(taken[0]) in self._overwritten():
            return None
        source, put_back = taken
        if id(source) not in self.extracts:
            return _Extract(output, version_of(output), source, put_back)
        outer = self.extracts[id(source)]
        return _Extract(output, version_of(output), outer.parameter, lambda rows: outer.put_back(put_back(rows)))

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        touched: set[int],
        layouts: list[Layout] | None,
    ) -> tuple[Any, list[Layout] | None]:
        """Record the call's uses, or give its parameters up. Returns the output to go on with, and its layout."""
        layout = layouts[0] if layouts else self._one_for_each_sample(func, args, kwargs, output, touched)
        uses = self._uses(func, args, kwargs, output, layout)
        covered = touched & {id(use.parameter) for use in uses} - self._overwritten()
        self.given_up |= {self._owner(tensor) for tensor in touched - covered}
        if not covered or layout is None:
            return output, layouts
        output = self._tap(output)
        for use in uses:
            if id(use.parameter) in covered:
                if id(use.parameter) in self.extracts:
                    use = self.extracts[id(use.parameter)].use_of_parameter(use)
                recorded = RecordedUse(use, version_of(use.reads) if use.reads is not None else 0)
                # Hooked now, not after the forward pass: a later in-place operation would make it another tensor.
                output.register_hook(recorded.arrive)
                self.uses[id(use.parameter)].append(recorded)
        if layout.assumed:  # these uses are right only if what was assumed before is
            layout = replace(layout, assumed=layout.assumed | {self._owner(tensor) for tensor in covered})
        return output, [layout]

    def _one_for_each_sample(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        touched: set[int],
    ) -> Layout | None:
        """The layout of values of a parameter that look as if there were one for each sample.

        Class tokens are expanded to the batch, and indices of shape (N, T) may not be computed from the inputs
        (positions, segments). That they are as many as the samples may be chance; later calls tell.
        """
        looks = func is torch.Tensor.expand or (func is F.embedding and (args or [kwargs["input"]])[0].dim() > 1)
        if not looks or not isinstance(output, Tensor) or output.dim() == 0 or output.shape[0] != self.n:
            return None
        return Layout(0, assumed=frozenset({self._owner(tensor) for tensor in touched}))

    def _overwritten(self) -> set[int]:
        """Extracts that an in-place operation has made something else."""
        return {tensor for tensor, extract in self.extracts.items() if version_of(extract.tensor) != extract.version}

    def _owner(self, tensor: int) -> int:
        return id(self.extracts[tensor].parameter) if tensor in self.extracts else tensor

    def _uses(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        layout: Layout | None,
    ) -> list[ParameterUse]:
        rule = RULES.get(func)
        if rule is None or not isinstance(output, Tensor) or not torch.is_grad_enabled() or output.dim() == 0:
            return []
        if not _takes(rule, (self.n, *args), kwargs):
            return []
        if layout is None or layout.dim < 0 or kwargs.get("out") is not None or output.is_complex():
            return []
        written_in_place = any(output is argument for argument in (*args, *kwargs.values()))
        if written_in_place and not output.requires_grad:
            return []
        with torch.no_grad():
            if layout.samples_first:
                return rule(self.n, *args, **kwargs) or []
            if layout.dim and not POSITIONWISE.get(func):
                return []
            return self._uses_moved(rule, args, kwargs, layout)

    def _uses_moved(
        self, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout
    ) -> list[ParameterUse]:
        """A rule's uses where the samples do not come first: what it reads, and the gradients, are moved for it."""
        if any((of := self.layout_of(t)) and of.place != layout.place for t in _tensors_among(args, kwargs)):
            return []

        def in_front(value: Any) -> Any:
            return layout.in_front(value, self.n) if self.layout_of(value) else value

        def moved(use: ParameterUse) -> ParameterUse:
            def rows(grad: Tensor, start: int, stop: int) -> Tensor:
                return use.rows(layout.in_front(grad, self.n), start, stop)

            return ParameterUse(use.parameter, rows, use.reads)

        uses = rule(self.n, *map(in_front, args), **{name: in_front(value) for name, value in kwargs.items()})
        return [moved(use) for use in uses or []]

    def _tap(self, output: Tensor) -> Tensor:
        if output.requires_grad:
            return output
        if is_view(output):
            output = output.clone()  # marking a view as written would mark the tensor it shows
        return _Tap.apply(output, self.root)  # type: ignore[no-any-return, no-untyped-call]


def _tensors_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Every tensor among a call's arguments, also in lists and tuples there."""
    found = []
    for argument in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (tuple, list, Mapping)):
            found.extend(tensors_of(argument))
    return found


def _takes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a rule knows a call's keywords: PyTorch takes those of NumPy too, as ``axis`` and ``x1``."""
    if kwargs:
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError:
            return False
    return True


def _goes_on(func: Callable[..., Any], output: Any, touched: set[int]) -> bool:
    """Whether a call may carry a parameter's values into another tensor: into one that it returns or writes to."""
    if output is None:
        return getattr(func, "__name__", "") != "__get__"  # p.grad may be None
    return any(id(tensor) not in touched for tensor in tensors_of(output))
