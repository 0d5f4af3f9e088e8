from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.measures import MeasureOptions

FIELDS = dataclasses.fields(MeasureOptions)


@pytest.mark.parametrize("function", [fm.measure, fm.compare])
def test_an_option_has_one_type_and_one_default(function: Callable[..., Any]) -> None:
    types, options = get_type_hints(function), get_type_hints(MeasureOptions)
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: (types[p.name], p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {field.name: (options[field.name], field.default) for field in FIELDS}


@pytest.mark.parametrize("function", [fm.measure, fm.compare])
def test_every_option_reaches_the_passes(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a value of its own each, none is dropped and no two are swapped on the way."""
    given = {field.name: object() for field in FIELDS}
    received: dict[str, object] = {}

    def receive(**options: object) -> None:
        received.update(options)
        raise InterruptedError

    monkeypatch.setattr(f"{function.__module__}.MeasureOptions", receive)
    with pytest.raises(InterruptedError):
        function({"a": nn.Linear(1, 2), "b": nn.Linear(1, 2)}, None, **given)
    assert received == given


@pytest.mark.parametrize("function", [fm.measure, fm.compare])
def test_help_explains_every_option(function: Callable[..., Any]) -> None:
    lines = [line.split(":")[0] for line in (inspect.getdoc(function) or "").splitlines() if line.startswith("    ")]
    assert {field.name for field in FIELDS} <= {line.strip() for line in lines if not line.startswith("     ")}
    assert "All others" not in (function.__doc__ or "")


@pytest.mark.parametrize("function", [fm.measure, fm.compare])
def test_a_misspelled_option_is_named(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'trails'"):
        function(nn.Linear(2, 2), (torch.zeros(2, 2), torch.zeros(2)), trails=2)
