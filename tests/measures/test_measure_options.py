from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.errors import FlatminimaError, ImpreciseWarning, NotAMinimumWarning
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


WRONG: list[tuple[str, Any]] = [
    *(("trials", value) for value in ("5", 2.5, None, True)),
    *(("subset_size", value) for value in ("5", True)),
    *(("seed", value) for value in (1.5, 2**70)),
    *(("batchnorm", value) for value in ("10", 2.5, True, None)),
    *(("logit_normalization", value) for value in ("0.04", True, 1j)),
    *(("max_standard_error", value) for value in ("0.1", True, float("nan"))),
    *(("robustness_samples", value) for value in ("5", 2.5, -1)),
    *(("memory_budget", value) for value in ("1GB", 0, float("inf"))),
    *(("initial", value) for value in ([1], nn.Linear(2, 2))),
    *((name, "yes") for name in ("scale_invariant", "per_parameter", "distributed", "progress")),
    *((name, ["raise"]) for name in ("on_singular", "path", "loss")),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_an_option_of_a_wrong_type_is_named_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(FlatminimaError, match=name) as raised:
        MeasureOptions(**{name: value})
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
@pytest.mark.parametrize("kind", [np.int64, np.float64, np.float32])
def test_numpys_numbers_are_options_too(kind: Any) -> None:
    names = ("trials", "subset_size", "robustness_samples", "seed") if kind is np.int64 else ()
    options = {name: kind(3) for name in (*names, "logit_normalization", "max_standard_error")}
    options |= {"memory_budget": kind(1e5)} | ({"batchnorm": kind(3)} if kind is np.int64 else {})
    torch.manual_seed(0)
    samples = torch.randn(12, 4), torch.arange(12) % 3
    found = fm.measure(nn.Linear(4, 3), samples, progress=False, **({"trials": 3, "subset_size": 3} | options))
    assert fm.Characterization.from_json(found.to_json()).settings == found.settings


def minima() -> tuple[dict[str, nn.Module], tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {name: nn.Linear(20, 3).double() for name in "ab"}
    return models, (torch.randn(40, 20, dtype=torch.float64), torch.arange(40) % 3)


PRECISION: dict[str, Any] = {"subset_size": 5, "progress": False}


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (6, r"all 6 trials the standard error of γ̂ is \S+, not at most max_standard_error=1e-09: raise"),
        (2, "at least 5"),
    ],
)
def test_a_standard_error_that_is_not_reached_is_said(trials: int, message: str) -> None:
    models, data = minima()
    with pytest.warns(ImpreciseWarning, match=message):
        fm.measure(models["a"], data, trials=trials, max_standard_error=1e-9, **PRECISION)
    with pytest.warns(ImpreciseWarning, match="γ̂'s difference between 'a' and 'b'"):
        fm.compare(models, data, trials=trials, max_standard_error=1e-9, **PRECISION)


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_a_standard_error_that_is_reached_is_not_warned_of() -> None:
    models, data = minima()
    fm.measure(models["a"], data, trials=8, max_standard_error=1e9, **PRECISION)
    assert (
        len(fm.compare(models, data, trials=8, max_standard_error=1e9, **PRECISION).difference("a", "b").per_trial) == 5
    )


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
@pytest.mark.parametrize("seed", [-(2**63), 2**60, 2**64 - 1])
def test_whatever_a_generator_takes_is_a_seed(seed: int) -> None:
    torch.manual_seed(0)
    samples = torch.randn(12, 4), torch.arange(12) % 3
    found = fm.measure(nn.Linear(4, 3), samples, seed=seed, measures="cheap", subset_size=4, trials=1)
    assert found.settings.seed == seed


def test_measures_may_come_from_a_generator() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(30, 5), torch.arange(30) % 3

    def parameters(trial: fm.measures.Trial) -> float:
        return float(sum(p.numel() for p in trial.model.parameters()))

    how: dict[str, Any] = {"subset_size": 6, "trials": 2, "progress": False}
    with pytest.warns(NotAMinimumWarning):
        found = fm.measure(model, (x, y), measures=(each for each in ("margin", parameters)), **how)
    assert {"margin", "parameters"} <= set(found.estimates())
    assert found.to_markdown(name for name in ["margin"]).count("margin") == 1


def test_a_tracked_picture_may_be_of_a_generator() -> None:
    tracker = fm.Tracker((torch.randn(30, 5), torch.arange(30) % 3), MeasureOptions(6, 2, progress=False))
    tracker(nn.Linear(5, 3), 1)
    axes = tracker.plot(name for name in ["sensitivity"])
    assert "sensitivity" in [text.get_text() for text in axes.get_legend().get_texts()]
