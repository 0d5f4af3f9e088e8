"""What a batch is: inputs are a tensor, a tuple of positional arguments or a dict of keyword arguments."""

from __future__ import annotations

import copy
import dataclasses
import enum
import numbers
import sys
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, require
from flatminima.torch_compat import lacks_a_graph

Inputs = Any
"""A tensor, a tuple or list (positional arguments), or a mapping (keyword arguments); every tensor has N rows.

Tuples, lists, mappings and dataclasses nest. What is no tensor is one of two things: a sequence or array of length N,
which holds something for every sample, or a constant (a number, a string, None, a tensor without dimensions).
"""

_CONSTANTS = (type(None), str, bytes, numbers.Number, enum.Enum, torch.dtype, torch.device, torch.Size)


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply ``function`` to every tensor of nested containers, which are made anew; hand everything else on.

    The containers are tuples, lists, mappings and dataclasses, each of its own type.
    """
    if isinstance(inputs, Tensor):
        return function(inputs)
    return _rebuilt(inputs, lambda value, _: map_tensors(function, value))


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Every tensor of nested containers, in the order of :func:`map_tensors`."""
    return [tensor for _, tensor in _named_tensors(inputs, "")]


def batch_size(inputs: Inputs) -> int:
    """The number of samples N: the common first dimension of every tensor that has one.

    Raises:
        FlatminimaError: if there is no such tensor, their first dimensions differ, or one is nested.
    """
    require(
        not any(tensor.is_nested for tensor in tensors_of(inputs)),
        "nested tensors cannot be indexed by sample here: pad them to one length, and give the model a mask",
    )
    require(
        all(tensor.layout == torch.strided for tensor in tensors_of(inputs)),
        "sparse tensors cannot be indexed by sample here: pass them dense (to_dense())",
    )
    named = [(name, len(tensor)) for name, tensor in _named_tensors(inputs, "") if tensor.dim()]
    sizes = {size for _, size in named}
    if len(sizes) != 1:
        found = ", ".join(f"{name or 'the tensor'} has {size}" for name, size in named[:8])
        raise FlatminimaError(
            "inputs and targets must be tensors that share their first dimension (the samples); "
            f"found {f'{sizes}: {found}' if named else 'none'}"
        )
    return sizes.pop()


def take(inputs: Inputs, indices: Tensor | slice) -> Inputs:
    """The samples at ``indices`` in new tensors and containers of the same types, free to be written to.

    Args:
        inputs: N samples. Lists, other sequences and arrays of length N are indexed as tensors are; numbers, strings,
            None and tensors without dimensions are handed on.
        indices: (n,), or a slice; or (m, n) for m groups, whose tensors are then (m, n, ...).

    Raises:
        FlatminimaError: by name for what is neither N things nor a constant, and for N things that are no tensor
            where there are groups.
    """
    return taker(inputs)(indices)


def taker(inputs: Inputs) -> Callable[[Tensor | slice], Inputs]:
    """:func:`take` of the same inputs, again and again: what they consist of is looked at once, here.

    Raises:
        FlatminimaError: by name for what is neither N things nor a constant; the function itself for N things that are
            no tensor where there are groups.
    """
    return _taker(inputs, batch_size(inputs), "")


def _taker(value: Any, size: int, name: str) -> Callable[[Tensor | slice], Any]:
    if isinstance(value, Tensor):
        return partial(_rows if value.dim() else _copies, value)
    if _is_constant(value):
        return lambda indices: value
    if _is_per_sample(value, size):
        return partial(_things, value, name)
    require(
        _is_container(value) and not _is_list_of_constants(value),
        f"the batch's {name or 'content'} ({type(value).__name__}) is neither {size} things, one for each sample, "
        "nor a number, string or None: leave it out of the batch, or make it one of these",
    )
    inner = [_taker(part, size, f"{name}{key}") for key, part in _parts(value)]
    return lambda indices: _with_parts(value, [take_part(indices) for take_part in inner])


def _rows(tensor: Tensor, indices: Tensor | slice) -> Tensor:
    return tensor[indices].clone() if isinstance(indices, slice) else tensor[indices]


def _copies(number: Tensor, indices: Tensor | slice) -> Tensor:
    """Of a tensor without dimensions: one, or one for each group."""
    return number.expand(len(indices)).clone() if _is_grouped(indices) else number.clone()  # type: ignore[arg-type]


def _things(value: Any, name: str, indices: Tensor | slice) -> Any:
    """What is no tensor and has one thing for each sample."""
    require(
        not _is_grouped(indices),
        f"the batch's {name} is no tensor ({type(value).__name__}), so it cannot be split for all sub-batches "
        "together: choose passes='one-by-one'",
    )
    if _is_array(value):
        return value[indices if isinstance(indices, slice) else indices.tolist()].copy()
    chosen = range(len(value))[indices] if isinstance(indices, slice) else indices.tolist()
    return _of_type(value, [copy.copy(value[i]) for i in chosen])


def _is_grouped(indices: Tensor | slice) -> bool:
    return isinstance(indices, Tensor) and indices.dim() > 1


def _is_constant(value: Any) -> bool:
    is_number = _is_numpy(value, "generic") or (_is_array(value) and not value.ndim)
    return is_number or isinstance(value, _CONSTANTS) or (callable(value) and not _is_container(value))


def _is_array(value: Any) -> bool:
    return _is_numpy(value, "ndarray")


def _is_numpy(value: Any, kind: str) -> bool:
    """Without an import: where numpy is not installed, or not yet imported, nothing is an array."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy, kind))


def _is_per_sample(value: Any, size: int) -> bool:
    """Whether a value holds one thing for each of ``size`` samples, and is no container of tensors."""
    if _is_array(value):
        return bool(value.ndim) and len(value) == size
    return isinstance(value, Sequence) and len(value) == size and not tensors_of(value)


def _is_list_of_constants(value: Any) -> bool:
    """Such as two numbers in a batch of three: whether they belong to samples cannot be told."""
    return isinstance(value, Sequence) and len(value) > 0 and all(map(_is_constant, value))


def _is_container(value: Any) -> bool:
    return isinstance(value, (tuple, list, Mapping)) or _is_dataclass(value)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _parts(container: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, each with what to write behind the container's name to name it."""
    if isinstance(container, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in container.items())
    elif isinstance(container, (tuple, list)):
        names = getattr(container, "_fields", None)
        yield from ((f".{names[i]}" if names else f"[{i}]", value) for i, value in enumerate(container))
    elif _is_dataclass(container):
        yield from ((f".{field.name}", getattr(container, field.name)) for field in dataclasses.fields(container))


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    else:
        for key, inner in _parts(value):
            yield from _named_tensors(inner, f"{name}{key}")


def _rebuilt(container: Any, function: Callable[[Any, str], Any]) -> Any:
    """A container of the same type that holds ``function(value, key)``; anything else is handed on."""
    if not _is_container(container):
        return container
    return _with_parts(container, [function(value, key) for key, value in _parts(container)])


def _with_parts(container: Any, values: list[Any]) -> Any:
    """A container of the same type that holds ``values`` in the places of its own."""
    if isinstance(container, (tuple, list)):
        return _of_type(container, values)
    if isinstance(container, Mapping):
        return _mapping_like(container, dict(zip(container, values, strict=True)))
    clone = copy.copy(container)
    for field, value in zip(dataclasses.fields(container), values, strict=True):
        object.__setattr__(clone, field.name, value)  # a frozen dataclass's own refuses
    return clone


def _of_type(sequence: Any, values: list[Any]) -> Any:
    """``values`` as a sequence of the same type, named tuples included."""
    kind = type(sequence)
    if kind is tuple or kind is list:
        return kind(values)
    if hasattr(kind, "_make"):
        return kind._make(values)
    try:
        return kind(values)
    except TypeError:  # its constructor wants something else (a range, say)
        return tuple(values) if isinstance(sequence, tuple) else values


def _mapping_like(mapping: Any, items: dict[Any, Any]) -> Any:
    """``items`` as a mapping of the same type, with the attributes that it has beside them."""
    if type(mapping) is dict:
        return items
    if not isinstance(mapping, (dict, UserDict)):
        try:
            return type(mapping)(items)
        except TypeError:
            return items
    clone: Any = copy.copy(mapping)
    own = getattr(clone, "__dict__", {})
    if getattr(mapping, "__dict__", None) is mapping:  # the idiom for items that are attributes as well
        clone.__dict__ = clone
    else:
        own.update({name: items[name] for name, value in own.items() if name in items and value is mapping[name]})
    clone.update(items)
    return clone


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output, whatever it is: a tuple holds positional arguments, a mapping keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def call_model(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits: its output if that is a tensor, else the output's ``logits`` (Hugging Face models).

    Of a single sample the first dimension may be lacking, as after ``squeeze()``; it is put back.

    Raises:
        FlatminimaError: if the output is neither, or complex.
    """
    output = run_model(model, inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise FlatminimaError(
            f"{type(model).__name__} returned {type(output).__name__}: "
            "return the logits as a tensor, or an object with `.logits`"
        )
    if logits.is_complex():
        raise FlatminimaError(f"{type(model).__name__} returned {logits.dtype}: return real logits")
    if logits.shape[:1] != (1,) and {len(tensor) for tensor in tensors_of(inputs) if tensor.dim()} == {1}:
        return logits.unsqueeze(0)
    return logits


def call_model_without_graph(model: nn.Module, inputs: Inputs) -> Tensor:
    """:func:`call_model` where no gradient is wanted; a forward that takes derivatives itself still has its own."""
    try:
        with torch.no_grad():
            return call_model(model, take(inputs, slice(None)))
    except RuntimeError as error:
        if not lacks_a_graph(error):
            raise
        with torch.enable_grad():
            return call_model(model, take(inputs, slice(None))).detach()


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (the CPU for a model without any)."""
    for parameter in model.parameters():  # not next() with a default, which PyTorch 2.6 cannot compile
        return parameter.device
    return torch.device("cpu")


def to_device(batch: tuple[Inputs, Tensor], device: torch.device) -> tuple[Inputs, Tensor]:
    """A batch (inputs, targets) on ``device``."""
    inputs, targets = batch
    return map_tensors(lambda tensor: tensor.to(device), inputs), targets.to(device)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``module(...)`` call ``forward`` instead of its own."""
    before = module.__dict__.get("forward")
    try:
        module.__dict__["forward"] = forward
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before
