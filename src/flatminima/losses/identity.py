"""What tells one loss from another, in words: two of one name may be two losses."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from numbers import Number
from types import CellType, CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.losses.forms import Loss, per_sample_form, single_output
from flatminima.network import add_tensor

_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
"""What functions and plain objects print that another process gives otherwise."""

_DIGITS = 16

_SIMPLE = (Number, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that say nothing of a loss: the mode, hooks, and what holds its tensors."""


def form_in_words(loss: Loss, *, learned: bool = False) -> str:
    """A loss's per-sample form as it and its public attributes print, the same in every process.

    What that does not show ends it as a digest: tensors, other attributes, what a ``functools.partial`` or a method is
    bound to; of a function the names and constants in its code, its defaults, and what it encloses. Of modules and
    other objects that it encloses the kind alone counts, as training may change them. What code computes is not known
    beyond that.

    Args:
        loss: one that measures take.
        learned: whether the values of its tensors that require gradients count, or their shapes alone.

    Raises:
        FlatminimaError: for what is no loss.
    """
    form = single_output(per_sample_form(loss))
    held = _held(form)
    return f"{_printed(form)} {_Hashes(learned).of(held).hex()[:_DIGITS]}" if held else _printed(form)


def brief_form(words: str) -> str:
    """Of :func:`form_in_words`, what the form itself prints."""
    return words.partition(" {")[0]


def brief_forms(first: str, second: str) -> tuple[str, str]:
    """Of two different ones, :func:`brief_form`, as long as that tells them apart."""
    brief = brief_form(first), brief_form(second)
    return brief if brief[0] != brief[1] else (first, second)


def _printed(form: Any) -> str:
    public = {
        name: value for name, value in _attributes(form).items() if isinstance(value, _SIMPLE) and name[:1] != "_"
    }
    return _ADDRESS.sub("", f"{form!r} {public}")


def _attributes(value: Any) -> dict[str, Any]:
    return {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in _OF_EVERY_MODULE}


def _held(form: Any) -> list[Any]:
    """What a loss has beside what it prints."""
    if isinstance(form, functools.partial):
        return [form.func, form.args, form.keywords]
    if isinstance(form, MethodType):
        return [form.__func__, _settings(form.__self__)]
    if isinstance(form, FunctionType):
        enclosed = [_content(cell) for cell in form.__closure__ or ()]
        return [_named_in(form.__code__, form.__doc__), form.__defaults__, form.__kwdefaults__, enclosed]
    if isinstance(form, nn.Module):
        inner = [_settings(module) for module in form.children()]
        tensors = [*form.named_parameters(), *form.named_buffers()]
        return [part for part in (tensors, _hidden(form), inner) if part]
    return _hidden(form)


def _hidden(value: Any) -> list[Any]:
    attributes = _attributes(value).items()
    return [(name, item) for name, item in attributes if name[:1] == "_" or not isinstance(item, _SIMPLE)]


def _settings(value: Any) -> list[Any]:
    """Of an object that a loss is bound to or made of: its kind, and unless it is a network what is written in it."""
    kind = type(value).__qualname__
    if isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
        return [kind]
    return [kind, *((name, item) for name, item in _attributes(value).items() if isinstance(item, (*_SIMPLE, Tensor)))]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _named_in(code: CodeType, doc: str | None = None) -> set[Any]:
    """Names and constants of a function and those within it, in no order: that depends on Python's version."""
    found: set[Any] = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _named_in(constant)
        elif constant is not None and constant != doc and "<locals>" not in str(constant):
            found.add((type(constant).__name__, constant))
    return found


class _Hashes:
    """Digests of values, the same in every process; of what could print otherwise in another, its type's."""

    def __init__(self, learned: bool) -> None:
        self._learned = learned
        self._found: dict[int, bytes] = {}
        self._held: list[Any] = []  # as ids are those of what lives

    def of(self, value: Any) -> bytes:
        """The digest, found once for a value that is met again; a value within itself counts as such."""
        if id(value) not in self._found:
            self._held.append(value)
            self._found[id(value)] = b"within itself"
            self._found[id(value)] = hashlib.sha256(self._bytes_of(value)).digest()
        return self._found[id(value)]

    def _bytes_of(self, value: Any) -> bytes:
        kind = type(value).__qualname__.encode()
        if isinstance(value, Tensor):
            return kind + self._tensor(value)
        if isinstance(value, _SIMPLE):
            return kind + repr(value).encode()
        if isinstance(value, (list, tuple)):
            return kind + b"".join(map(self.of, value))
        if isinstance(value, Mapping):
            return kind + self._in_no_order(value.items())
        if isinstance(value, (set, frozenset)):
            return kind + self._in_no_order(value)
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            return kind + self.of(_held(value))
        if dataclasses.is_dataclass(value) or isinstance(value, (SimpleNamespace, argparse.Namespace)):
            return kind + self.of(_settings(value))
        if hasattr(value, "tobytes") and not getattr(getattr(value, "dtype", None), "hasobject", True):
            return kind + f"{value.dtype} {value.shape}".encode() + bytes(value.tobytes())  # numpy's
        return kind

    def _in_no_order(self, values: Iterable[Any]) -> bytes:
        return b"".join(sorted(map(self.of, values)))

    def _tensor(self, tensor: Tensor) -> bytes:
        shape = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode()
        if (tensor.requires_grad and not self._learned) or tensor.is_meta or tensor.is_nested:
            return shape
        digest = hashlib.sha256(shape)
        add_tensor(digest, tensor if tensor.layout == torch.strided else tensor.detach().to_dense())
        return digest.digest()
