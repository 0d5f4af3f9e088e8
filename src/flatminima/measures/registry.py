"""Every measure by name, with what it costs and where it comes from; and how users' own become measures too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from flatminima.errors import FlatminimaError, did_you_mean, require
from flatminima.measures.trial import Trial

Cost = Literal["free", "forward", "pass", "costly", "weights"]
"""What a measure takes beside ξ: nothing; forward passes; up to a forward and backward pass of the trial's samples;
more than that; or the weights alone, no data."""

Group = Literal["free", "paper", "cheap", "weights", "all"]
"""Measures that are free from ξ; the paper's; those that take no more than a forward and backward pass; those of the
weights alone; all."""

MeasureFunction = Callable[[Trial], float]
"""What a trial knows → one number; NaN where this trial has none."""


@dataclass(frozen=True)
class Measure:
    """A number that each trial gives for a minimum.

    Attributes:
        name: as in ``Characterization.estimates()``.
        function: gives the number; raises :class:`~flatminima.errors.UndefinedMeasureError` for models, data or losses
            that it is not defined for.
        label: its name in tables.
        cost: see :data:`Cost`.
        source: where it comes from.
        paper: whether it is one of Jia & Su's, among which γ̂'s parts are counted.
        larger_is_better: whether theory expects large values of minima that generalize; ranks follow it.
    """

    name: str
    function: MeasureFunction
    label: str
    cost: Cost = "costly"
    source: str = ""
    paper: bool = False
    larger_is_better: bool = False

    def of(self, trial: Trial) -> float:
        """Its value in a trial.

        Raises:
            FlatminimaError: if the function returns anything but one number.
        """
        found = self.function(trial)
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError):
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else ""
            raise FlatminimaError(
                f"measure {self.name!r} returned a {type(found).__name__}{shape}: return one number"
            ) from None


CATALOGUE: dict[str, Measure] = {}
"""The measures that :func:`~flatminima.measure` knows by name, in the order of tables."""


def catalogued(
    label: str, *, cost: Cost, source: str, paper: bool = False, larger_is_better: bool = False
) -> Callable[[MeasureFunction], MeasureFunction]:
    """A decorator: make a function of a trial a measure that is known by the function's name.

    Args:
        label: as of :class:`Measure`, and so all others.
        cost: see there.
        source: see there.
        paper: see there.
        larger_is_better: see there.

    Raises:
        FlatminimaError: if there is a measure of that name.
    """
    require(cost in get_args(Cost), f"unknown cost {cost!r}: use one of {', '.join(get_args(Cost))}")

    def enter(function: MeasureFunction) -> MeasureFunction:
        name = function.__name__
        require(name not in CATALOGUE, f"there is a measure {name!r} already: rename the function")
        CATALOGUE[name] = Measure(name, function, label, cost, source, paper, larger_is_better)
        return function

    return enter


@dataclass(frozen=True)
class Selection:
    """Measures to be taken.

    Attributes:
        measures: every one once, those of the catalogue in its order.
        by_name: names of those that were asked for one by one: where one is not defined, that is an error.
    """

    measures: tuple[Measure, ...]
    by_name: frozenset[str]


def selected(asked: str | MeasureFunction | Measure | Iterable[str | MeasureFunction | Measure]) -> Selection:
    """Names, groups, :class:`Measure` objects and callables as measures; γ̂ and what else the paper has of ξ always.

    A callable is a measure by its ``__name__``.

    Raises:
        FlatminimaError: for an unknown name, a callable without a name of its own, or two measures of one name.
    """
    known = {measure.name for measure in CATALOGUE.values() if measure.paper and measure.cost == "free"}
    own: dict[str, Measure] = {}
    by_name: set[str] = set()
    for item in one_by_one(asked):
        if isinstance(item, str) and item in get_args(Group):
            known |= {measure.name for measure in CATALOGUE.values() if _is_in(measure, item)}
            continue
        measure = _measure_of(item)
        by_name.add(measure.name)
        if isinstance(item, str):
            known.add(measure.name)
            continue
        require(
            measure.name not in CATALOGUE and own.get(measure.name, measure) == measure,
            f"there are two measures {measure.name!r}: rename yours",
        )
        own[measure.name] = measure
    measures = [measure for measure in CATALOGUE.values() if measure.name in known] + list(own.values())
    return Selection(tuple(measures), frozenset(by_name))


def one_by_one(asked: Any) -> tuple[Any, ...]:
    """What :func:`selected` takes, item by item: an iterator gives its own only once."""
    is_one = isinstance(asked, (str, Measure)) or callable(asked) or not isinstance(asked, Iterable)
    return (asked,) if is_one else tuple(asked)


def _measure_of(item: str | MeasureFunction | Measure) -> Measure:
    if isinstance(item, Measure):
        return item
    if isinstance(item, str):
        names = (*CATALOGUE, *get_args(Group))
        require(
            item in CATALOGUE, f"unknown measure {item!r}{did_you_mean(item, names)}; use one of {', '.join(names)}"
        )
        return CATALOGUE[item]
    require(callable(item), f"a measure is a name, a group or a callable of a trial, got {type(item).__name__}")
    name = getattr(item, "__name__", "")
    require(
        name.isidentifier(),
        f"a measure needs a name, and {item!r} has none: write it with def, or pass Measure('name', function, 'label')",
    )
    return Measure(name, item, name)


def _is_in(measure: Measure, group: str) -> bool:
    if group == "all":
        return True
    if group == "paper":
        return measure.paper
    if group == "cheap":
        return measure.cost != "costly"
    return measure.cost == group


def label_of(name: str) -> str:
    """A measure's name in tables; users' own have the one they are known by."""
    return CATALOGUE[name].label if name in CATALOGUE else name


def in_table_order(names: Iterable[str]) -> Sequence[str]:
    """Names without repetition: the catalogue's in its order, then the others as they come."""
    given = list(dict.fromkeys(names))
    return [name for name in CATALOGUE if name in given] + [name for name in given if name not in CATALOGUE]
