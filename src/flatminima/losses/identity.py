"""What tells one loss from another, in words: two of one name may be two losses."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from numbers import Number
from types import CellType, CodeType
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.losses.forms import Loss, per_sample_form
from flatminima.network import Digest, add_tensor

_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
"""What functions and plain objects print that another process gives otherwise."""

_DIGITS = 16


def form_in_words(loss: Loss) -> str:
    """A loss's per-sample form as it and its public attributes print, the same in every process.

    A module ends with a digest of its parameters and buffers; a function with one of the names and constants in its
    code, its defaults, and the values that it encloses. What code computes is not known beyond that.

    Raises:
        FlatminimaError: for what is no loss.
    """
    form = per_sample_form(loss)
    held = _held(form)
    return f"{_printed(form)} {_digest(held)}" if held else _printed(form)


def brief_form(words: str) -> str:
    """Of :func:`form_in_words`, what the form itself prints."""
    return words.partition(" {")[0]


def brief_forms(first: str, second: str) -> tuple[str, str]:
    """Of two different ones, :func:`brief_form`, as long as that tells them apart."""
    brief = brief_form(first), brief_form(second)
    return brief if brief[0] != brief[1] else (first, second)


def _printed(value: Any) -> str:
    attributes = getattr(value, "__dict__", {})
    public = {name: item for name, item in attributes.items() if not name.startswith("_")}
    return _ADDRESS.sub("", f"{value!r} {public}")


def _held(value: Any) -> list[Any]:
    """What a callable has beside what it prints."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module):
        return [*value.named_parameters(), *value.named_buffers()]
    function = getattr(value, "__func__", value)
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return []
    enclosed = [_content(cell) for cell in function.__closure__ or ()]
    return [*_named_in(code, function.__doc__), function.__defaults__, function.__kwdefaults__, enclosed]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _named_in(code: CodeType, doc: str | None = None) -> list[Any]:
    constants = [constant for constant in code.co_consts if constant is not None and constant != doc]
    return [code.co_names, [_named_in(each) if isinstance(each, CodeType) else each for each in constants]]


def _digest(values: list[Any]) -> str:
    digest = hashlib.sha256()
    _add(digest, values, ())
    return digest.hexdigest()[:_DIGITS]


def _add(digest: Digest, value: Any, within: tuple[Any, ...]) -> None:
    """Go on with a value; with its type alone if another process could print it otherwise."""
    if any(value is outer for outer in within):  # a function that encloses itself
        return
    inside = (*within, value)
    if isinstance(value, Tensor):
        add_tensor(digest, value)
    elif isinstance(value, (list, tuple)):
        digest.update(f"({len(value)}".encode())
        for item in value:
            _add(digest, item, inside)
    elif isinstance(value, Mapping):
        _add(digest, list(value.items()), inside)
    elif isinstance(value, (set, frozenset)):
        digest.update(repr(sorted(map(repr, value))).encode())
    elif value is None or isinstance(value, (Number, str, torch.dtype, torch.device)):
        digest.update(f"{value!r},".encode())
    elif callable(value) or dataclasses.is_dataclass(value):
        digest.update(_printed(value).encode())
        _add(digest, _held(value), inside)
    else:
        digest.update(type(value).__qualname__.encode())
        with suppress(TypeError):  # all but arrays and bytes
            digest.update(memoryview(value).tobytes())
