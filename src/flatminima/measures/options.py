"""How minima are measured: every option of ``measure`` and ``compare``, with its default, its range and its meaning.

Those that are plain values are in :class:`PlainOptions`; an option is explained in one of the two, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeVar, cast

from torch import Tensor

from flatminima.choices import PlainOptions
from flatminima.errors import (
    ImpreciseWarning,
    did_you_mean,
    require,
    require_flag,
    require_integer,
    require_number,
    require_positive,
    require_seed,
    warn,
)
from flatminima.gramian import PathName, require_path
from flatminima.losses import Loss, per_sample_form
from flatminima.measures.registry import Measure, MeasureFunction, one_by_one, selected
from flatminima.measures.results import Estimate

Measures = str | MeasureFunction | Measure | Sequence[str | MeasureFunction | Measure]
"""One or several names, groups, callables or :class:`~flatminima.measures.Measure` objects."""

Initial = Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]]
"""A ``state_dict``, or several by the names of models."""

Function = TypeVar("Function", bound=Callable[..., Any])

MINIMUM_TRIALS = 5
"""Before so many trials a standard error is too uncertain itself to stop by."""

_ATTRIBUTES = "Attributes:\n"
_REFERENCE = "All others: see :class:`~flatminima.measures.MeasureOptions`."


@dataclass(frozen=True)
class MeasureOptions(PlainOptions):
    """Every option of :func:`~flatminima.measure` and :func:`~flatminima.compare`.

    Attributes:
        loss: ``"cross_entropy"``, a loss of :mod:`flatminima.losses` or ``torch.nn``, or ``loss(logits, targets)`` →
            (N',) tensor of per-sample losses.
        measures: What is measured beside γ̂, its parts and what else the paper has of ξ: names, or the groups
            ``"paper"`` (with the robustness), ``"free"`` (from ξ), ``"cheap"`` (at most a forward and backward pass a
            trial), ``"weights"`` (of the weights alone) and ``"all"``. Of a group, what is not defined for the network
            is left out, and said. Also callables of your own: each takes a :class:`~flatminima.measures.Trial`,
            returns a number, and is known by its ``__name__``; or :class:`~flatminima.measures.Measure` objects.
        initial: The weights that training began with, by name (a ``state_dict``), for measures of the distance. Where
            ``compare``'s models began with different ones: a ``state_dict`` for every model, by the models' names.
        per_parameter: Also report every parameter's share of ξ, in ``Characterization.shares``.
        path: Rows of J by layer rules where there are any ("rules"), or all by plain autograd, one sample at a time
            ("generic"): slower by far, and never needed, as rules are held against plain autograd.
        memory_budget: Bytes that may be used beside the model (None: half of what is free). Where the samples or the
            rows of J do not fit at once, ξ is formed in several passes, exactly.
        distributed: Split the trials over the ranks of the default process group (``torchrun``). Every rank calls with
            the same arguments and gets the whole result, which is that of a single process, or the error of any. Not
            for sharded models, whose processes share every trial anyway.
        progress: Show a bar with the time left on a terminal.

    Raises:
        FlatminimaError: for a value outside its range, or options that exclude each other.
    """

    loss: Loss = "cross_entropy"
    measures: Measures = ("paper",)
    initial: Initial | None = None
    per_parameter: bool = False
    path: PathName = "rules"
    memory_budget: int | None = None
    distributed: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        per_sample_form(self.loss)
        if isinstance(self.measures, Iterator):  # which the first look would empty
            object.__setattr__(self, "measures", one_by_one(self.measures))
        selected(self.measures)
        self._require_types()
        require_seed(self.seed)
        require(
            self.batchnorm == "eval" or (isinstance(self.batchnorm, Integral) and not isinstance(self.batchnorm, bool)),
            f"unknown batchnorm={self.batchnorm!r}: use 'eval' (running statistics) or the number of samples in a "
            "chunk",
        )
        self._convert_numbers()
        require(
            self.fisher == "empirical" or (self.batchnorm == "eval" and self.logit_normalization is None),
            f"fisher={self.fisher!r} is the exact Fisher of the network in eval mode at its own logits: "
            "leave batchnorm and logit_normalization out, or use fisher='empirical'",
        )
        require(
            self.max_standard_error is None or self.max_standard_error > 0,
            f"max_standard_error must be positive, got {self.max_standard_error}",
        )
        require(
            self.initial is None or isinstance(self.initial, Mapping),
            f"initial must be a state_dict, got {type(self.initial).__name__}: pass model.state_dict()",
        )
        require_path(self.path)
        require(
            self.on_singular in ("raise", "skip"), f"unknown on_singular={self.on_singular!r}: use 'raise' or 'skip'"
        )
        require(
            self.robustness_samples is None or self.robustness_samples >= 0,
            f"robustness_samples must be 0 or more, got {self.robustness_samples}",
        )

    def _require_types(self) -> None:
        for name in ("subset_size", "trials"):
            require_integer(name, getattr(self, name))
        if self.robustness_samples is not None:
            require_integer("robustness_samples", self.robustness_samples)
        for name in ("logit_normalization", "max_standard_error"):
            require_number(name, getattr(self, name), optional=True)
        if self.memory_budget is not None:
            require_positive("memory_budget", self.memory_budget)
        for name in ("scale_invariant", "per_parameter", "distributed", "progress"):
            require_flag(name, getattr(self, name))

    def _convert_numbers(self) -> None:
        """Numpy's, and 8e9 bytes, into what generators, JSON and slices take."""
        kinds = {
            **dict.fromkeys(("subset_size", "trials", "seed", "robustness_samples", "memory_budget"), int),
            **dict.fromkeys(("logit_normalization", "max_standard_error"), float),
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, kind(value))
        if self.batchnorm != "eval":
            object.__setattr__(self, "batchnorm", int(self.batchnorm))

    def for_model(self, name: str, models: Iterable[str]) -> MeasureOptions:
        """These options for one of several models, with its own initial weights.

        Args:
            name: the model's.
            models: the names of all.

        Raises:
            FlatminimaError: if initial weights by model are those of other models.
        """
        by_model = self.initial or {}
        if not by_model or not all(isinstance(entry, Mapping) for entry in by_model.values()):
            return self
        names = list(models)
        unknown = next((each for each in by_model if each not in names), None)
        require(
            unknown is None,
            f"initial= has weights of {unknown!r}{did_you_mean(str(unknown), names)}, which is none of the models: "
            "pass a state_dict, or in compare one for every model by its name",
        )
        require(name in by_model, f"initial= has no weights of {name!r}: pass one state_dict for every model")
        return replace(self, initial=cast("Mapping[str, Tensor]", by_model[name]))

    def precise_enough(self, values: Sequence[float]) -> bool:
        """Whether the mean of so many trials' values (NaN: left out) is as precise as was asked for."""
        if self.max_standard_error is None:
            return False
        kept = [value for value in values if not math.isnan(value)]
        return len(kept) >= MINIMUM_TRIALS and Estimate.of(kept).standard_error <= self.max_standard_error


def warn_of_imprecision(options: MeasureOptions, values: Sequence[float], what: str) -> None:
    """Warn where all trials together have not reached ``max_standard_error``.

    Args:
        options: as measured.
        values: one per trial, as for :meth:`MeasureOptions.precise_enough`.
        what: they are the trials' values of.
    """
    if options.max_standard_error is None or options.precise_enough(values):
        return
    few = f"; at least {MINIMUM_TRIALS} are needed" if len(values) < MINIMUM_TRIALS else ""
    warn(
        f"after all {len(values)} trials the standard error of {what} is {Estimate.of(values).standard_error:.2g}, not "
        f"at most max_standard_error={options.max_standard_error:g}{few}: raise trials",
        ImpreciseWarning,
    )


def with_options_explained(function: Function) -> Function:
    """Let ``help(function)`` explain every option, by the docstrings above, where the source refers to them."""
    if function.__doc__:  # none under python -OO
        texts = [(options.__doc__ or "").partition(_ATTRIBUTES)[2] for options in (PlainOptions, MeasureOptions)]
        attributes = "\n".join(text.partition("\n\n")[0].rstrip() for text in texts)
        function.__doc__ = function.__doc__.replace(_REFERENCE, attributes.strip())
    return function
