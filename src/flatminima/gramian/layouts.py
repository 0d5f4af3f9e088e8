"""Where the samples lie in a tensor that was computed from the inputs, and what a reshaping call does to that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The samples lie along one dimension, of length outer · N · inner, at the middle one of these three.

    Attributes:
        dim: the dimension; negative in :data:`LOST`.
        outer: copies of the batch one after another (two views concatenated, time folded before the samples).
        inner: positions of one sample side by side (time or windows folded behind the samples).
        assumed: parameters (by id) whose values are here and which look as if there were one for each sample. They are
            not computed from the inputs, so it may be another dimension that is as long.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    assumed: frozenset[int] = frozenset()

    @property
    def place(self) -> tuple[int, int, int]:
        """Everything but what is assumed."""
        return self.dim, self.outer, self.inner

    @property
    def samples_first(self) -> bool:
        """Whether the first dimension is the samples, each with its positions side by side: what rules take."""
        return self.dim == 0 and self.outer == 1

    def in_front(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor with its samples first: (N·outer·inner, ...) where they were, (N, ...) where they were behind."""
        shape = tensor.shape
        parts = tensor.reshape(*shape[: self.dim], self.outer, n, self.inner, *shape[self.dim + 1 :])
        return parts.transpose(0, 1).flatten(0, 2) if self.dim == 0 else parts.movedim(self.dim + 1, 0)

    def at(self, dim: int) -> Layout:
        """The same along another dimension."""
        return replace(self, dim=dim)


LOST = Layout(-1)
"""Computed from the inputs, but no dimension is known to be the samples."""

Layouts = Layout | list[Layout] | None
"""Of all tensors that a call returns, of each, or None where they are not computed from the inputs."""


@dataclass
class Call:
    """One call of a function with tensors that were computed from the inputs.

    Attributes:
        n: the number of samples, at least 2.
        func: the function.
        args: its positional arguments.
        kwargs: its arguments by keyword.
        output: what it returned.
        layout_of: the layout of a tensor that was computed from the inputs, None for others.
        tensors: its arguments that were, with their layouts.
        guessed: whether the result is only likely, and is to be held against plain autograd every time.
        refuted: parameters that are not, after all, one for each sample.
    """

    n: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    layout_of: Callable[[Any], Layout | None]
    tensors: list[tuple[Tensor, Layout]]
    guessed: bool = False
    refuted: set[int] = field(default_factory=set)

    def argument(self, position: int, names: str, default: Any = None) -> Any:
        """An argument given by position or by name, of which similar functions have several."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names.split() if name in self.kwargs), default)

    def first(self) -> tuple[Tensor, Layout | None]:
        """The first argument, and its layout."""
        tensor = self.args[0] if self.args else self.kwargs["input"]
        return tensor, self.layout_of(tensor)

    def lost(self, layout: Layout) -> Layout:
        """Of an argument whose dimension of the samples is summed over with others: it was not the samples' then."""
        self.refuted |= layout.assumed
        return LOST

    def merged(self, candidates: Iterable[Layout]) -> Layout:
        """The layout that arguments, each with its samples where they come to lie in the output, have in common."""
        layouts = list(candidates)
        known = [layout for layout in layouts if layout.dim >= 0]
        firm = [layout for layout in known if not layout.assumed]
        places = {layout.place for layout in known}
        if len(places) > 1:
            places = {layout.place for layout in firm}
            self.refuted.update(*(layout.assumed for layout in known))
        if len(places) != 1:
            return LOST
        if len(known) < len(layouts):
            self.guessed = True  # something unknown flows in; if it came from other samples, these interact
        return Layout(*places.pop(), frozenset() if firm else frozenset().union(*(one.assumed for one in known)))

    def aligned(self, output: Tensor) -> Layout:
        """The layout of an output that arguments are broadcast to."""
        return self.merged(self.broadcast(tensor, layout, output.shape) for tensor, layout in self.tensors)

    def broadcast(self, tensor: Tensor, layout: Layout, shape: Sequence[int]) -> Layout:
        """Where the samples come to lie when a tensor is broadcast to a shape."""
        dim = layout.dim + len(shape) - tensor.dim()
        kept = layout.dim >= 0 and dim >= 0 and shape[dim] == tensor.shape[layout.dim]
        return layout.at(dim) if kept else self.lost(layout)

    def guess(self, tensor: Tensor) -> Layout:
        """The samples first: what most tensors are."""
        self.guessed = True
        fits = tensor.dim() > 0 and tensor.shape[0] > 0 and tensor.shape[0] % self.n == 0
        return Layout(0, 1, tensor.shape[0] // self.n) if fits else LOST


def reshaped(layout: Layout, shape: Sequence[int], new: Sequence[int], n: int) -> Layout:
    """The layout after entries were put, in their order, into a tensor of another shape."""
    if layout.dim < 0 or math.prod(shape) != math.prod(new) or 0 in new:
        return LOST
    behind = layout.inner * math.prod(shape[layout.dim + 1 :])  # entries between those of one sample and of the next
    trailing = 1
    for dim in reversed(range(len(new))):
        if behind % trailing == 0 and new[dim] % (behind // trailing * n) == 0:
            inner = behind // trailing
            return replace(layout, dim=dim, outer=new[dim] // (inner * n), inner=inner)
        trailing *= new[dim]
    return LOST


def viewed(call: Call) -> Layouts:
    """The layout of views, found by taking the same view of a tensor without data that moves along the samples only."""
    tensor, layout = call.first()
    if layout is None:
        return None
    if layout.dim < 0:
        return LOST
    strides = [0] * tensor.dim()
    strides[layout.dim] = 1
    probe = torch.empty_strided(tensor.shape, strides, device="meta")
    views = call.func(probe, *call.args[1:], **{k: v for k, v in call.kwargs.items() if k != "input"})
    if isinstance(views, Tensor):
        return _layout_of_view(layout, views, call.n)
    return [_layout_of_view(layout, view, call.n) for view in views]


def _layout_of_view(layout: Layout, view: Tensor, n: int) -> Layout:
    along = [dim for dim in range(view.dim()) if view.stride(dim) and view.shape[dim] > 1]
    block = n * layout.inner
    if len(along) != 1 or view.stride(along[0]) != 1 or view.storage_offset() % block or view.shape[along[0]] % block:
        return LOST
    return replace(layout, dim=along[0], outer=view.shape[along[0]] // block)


def indexed(call: Call) -> Layouts:
    """``x[index]``."""
    tensor, layout = call.first()
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if all(part is None or part is Ellipsis or type(part) in (int, slice) for part in index):
        return viewed(call)
    given = [part for part in index if isinstance(part, Tensor)]
    if layout is None:  # a table that is the same for all samples
        (of_index,) = [call.layout_of(part) for part in given if call.layout_of(part) is not None][:1] or [LOST]
        whole = len(index) == 1 and isinstance(index[0], Tensor) and not _is_mask(index[0])
        return of_index if whole else LOST
    if layout.dim < 0 or not all(isinstance(part, (Tensor, list, int, slice)) or part in (None, ...) for part in index):
        return LOST
    if any(_is_mask(part) or isinstance(part, (bool, list)) for part in index):
        return LOST
    return _by_tensors(call, tensor, layout, index)


def _by_tensors(call: Call, tensor: Tensor, layout: Layout, index: tuple[Any, ...]) -> Layout:
    """``x[index]`` with tensors of numbers among numbers and slices."""
    named = sum(part is not None and part is not Ellipsis for part in index)
    parts: list[Any] = []
    for part in index:
        parts.extend([slice(None)] * (tensor.dim() - named) if part is Ellipsis else [part])
    parts.extend([slice(None)] * (tensor.dim() - sum(part is not None for part in parts)))
    places = [place for place, part in enumerate(parts) if part is not None]
    at = places[layout.dim]
    numbers = [place for place, part in enumerate(parts) if isinstance(part, (Tensor, int))]
    together = numbers == list(range(numbers[0], numbers[-1] + 1))
    depth = max(part.dim() for part in parts if isinstance(part, Tensor))
    first = numbers[0] if together else 0  # where the dimensions of the indices come to lie
    if isinstance(parts[at], slice):
        if parts[at] != slice(None) or any(call.layout_of(p) is not None for p in parts if isinstance(p, Tensor)):
            return LOST
        before = sum(place not in numbers for place in range(at))
        return layout.at(before + (depth if not together or numbers[0] < at else 0))
    own = parts[at]
    counts_samples = (
        isinstance(own, Tensor)
        and layout.outer == layout.inner == 1
        and own.dim() == depth
        and own.shape[0] == own.numel() == call.n
        and torch.equal(own.flatten(), torch.arange(call.n, device=own.device))
    )
    if not counts_samples:
        return LOST
    others = [(p, call.layout_of(p)) for p in parts if isinstance(p, Tensor) and p is not own]
    fits = all(of is None or (of.dim + depth - p.dim(), of.outer, of.inner) == (0, 1, 1) for p, of in others)
    return layout.at(first) if fits else LOST


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)


def written(call: Call) -> Layouts:
    """``x[index] = value``: the layout of x afterwards."""
    tensor, layout = call.first()
    index, value = call.args[1], call.args[2]
    of_value = call.layout_of(value)
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts):
        masks = [call.layout_of(part) for part in parts if isinstance(part, Tensor)]
        if len(parts) == 1 and masks and masks[0] is not None and _is_mask(parts[0]) and masks[0].dim >= 0:
            layout = layout or masks[0]
            call.guessed |= of_value is not None or layout.place != masks[0].place
            return layout
        call.guessed |= of_value is not None or any(of is not None for of in masks)
        return layout or call.guess(tensor)
    if of_value is None or of_value.dim < 0:
        call.guessed |= of_value is not None
        return layout or call.guess(tensor)
    candidates = [layout] if layout else [of_value.at(dim) for dim in range(tensor.dim())]
    for candidate in candidates:
        if candidate.dim < 0 or tensor.shape[candidate.dim] != candidate.outer * call.n * candidate.inner:
            continue
        strides = [0] * tensor.dim()
        strides[candidate.dim] = 1
        view = torch.empty_strided(tensor.shape, strides, device="meta")[index]
        target = _layout_of_view(candidate, view, call.n)
        if target.dim >= 0 and call.broadcast(value, of_value, view.shape).place == target.place:
            return candidate
    call.guessed = True
    return layout or call.guess(tensor)
