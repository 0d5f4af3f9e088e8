"""The trials: ξ of one subset after the other and its values, split over processes where there are several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor

from flatminima.errors import RankDeficientError, UndefinedMeasureError
from flatminima.gramian import (
    FactoredGram,
    LogDeterminant,
    factored_gram,
    log_determinant,
    log_determinant_parts,
    numerical_rank,
    unwrapped,
)
from flatminima.measures.preparation import PreparedModel
from flatminima.measures.registry import CATALOGUE, Selection
from flatminima.measures.trial import Trial
from flatminima.measures.unchanged import UnchangedWeights
from flatminima.network import differentiating
from flatminima.parallel import Processes, is_sharded
from flatminima.progress import track

Outcome = TypeVar("Outcome")


class ShareValues(NamedTuple):
    """One parameter's part of one subset's ξ."""

    trace: float
    """Its part of the trace of the subset's Fisher information."""
    log_det: float
    """ln det of its part of ξ; NaN where that is singular."""
    rank: int
    """Of its part of ξ."""


@dataclass(frozen=True)
class TrialValues:
    """What one subset gives.

    Attributes:
        values: every measure's by name; NaN where this trial has none.
        undefined: the measures that are not defined, with the reason.
        spectrum: eigenvalues of ξ in descending order, on the CPU.
        shares: of every parameter by name, where asked for.
        generic_parameters: parameters without a layer rule.
        dtype: the network's floating-point type.
    """

    values: dict[str, float]
    undefined: dict[str, str]
    spectrum: Tensor
    shares: dict[str, ShareValues] | None
    generic_parameters: tuple[str, ...]
    dtype: str

    @property
    def log_det_fisher(self) -> float:
        """The logarithm of det ξ; NaN where ξ is singular and that is to be skipped."""
        return self.values["log_det_fisher"]


def perform_trials(
    perform: Callable[[int], Outcome],
    trials: int,
    enough: Callable[[Sequence[Outcome]], bool],
    *,
    distributed: bool,
    progress: bool,
) -> list[Outcome]:
    """``[perform(t) for t in range(trials)]``, cut after the first trial at which ``enough`` says so.

    Distributed, every rank performs every world-size-th trial and they are exchanged round by round, so that the
    result, and where it is cut, are those of a single process. An exception on one rank is raised on all.

    Raises:
        FlatminimaError: if ``distributed`` without an initialized process group.
    """
    processes = Processes.all() if distributed else Processes()
    done: list[Outcome] = []
    rounds = range(0, trials, processes.size)
    for first in track(rounds, "measuring", progress and processes.rank == 0, is_part=True):
        numbers = range(first, min(first + processes.size, trials))
        own = partial(perform, numbers[processes.rank]) if processes.rank < len(numbers) else _nothing
        done += processes.gather(own)[: len(numbers)]
        for count in range(max(1, len(done) - processes.size + 1), len(done) + 1):
            if enough(done[:count]):
                return done[:count]
    return done


def _nothing() -> Any:
    """What a process without a trial of its own adds to a round."""


def perform_trial(prepared: PreparedModel, number: int) -> TrialValues:
    """The trial on subset ``number``: what the first of the model's processes finds, the same to the last bit on all.

    Raises:
        RankDeficientError: for a singular ξ, unless that is to be skipped.
        WrongGradientError: in the first trial, if a spot check against plain autograd fails.
    """
    return prepared.processes.gather(lambda: _values(prepared, number))[0]


def _values(prepared: PreparedModel, number: int) -> TrialValues:
    options, rows = prepared.options, prepared.rows
    inputs, targets = prepared.batch(number)
    form = partial(
        factored_gram,
        prepared.model,
        *rows.of_batch(inputs, targets),
        loss=rows.loss,
        logit_normalization=options.logit_normalization,
        batchnorm=options.batchnorm,
        plan=prepared.plan,
        path=options.path,
        checks=prepared.checks,
    )
    factored = form(scale_invariant=options.scale_invariant, shares=options.per_parameter)
    trial = Trial(
        number,
        unwrapped(prepared.model),
        inputs,
        targets,
        factored,
        _log_det(prepared, number, factored),
        rows.per_sample,
        prepared.train,
        len(prepared.samples),
        cast("Mapping[str, Tensor] | None", options.initial),  # this model's own, as prepared
        options,
        form,
        prepared.plan.affordable_samples,
        sharded=any(map(is_sharded, prepared.model.parameters())),
    )
    values, undefined = _measured(trial, prepared.selection, prepared.values_of_weights, prepared.weights)
    shares, samples = factored.shares, options.subset_size
    return TrialValues(
        values,
        undefined,
        spectrum=trial.spectrum,
        shares=None if shares is None else {name: _share(factored, unit, samples) for name, unit in shares.items()},
        generic_parameters=factored.generic_parameters,
        dtype=str(factored.dtype).removeprefix("torch."),
    )


def _measured(
    trial: Trial, selection: Selection, of_weights: dict[str, float], weights: UnchangedWeights
) -> tuple[dict[str, float], dict[str, str]]:
    """Every measure's value, and why those that have none are not defined.

    Args:
        trial: the trial.
        selection: the measures.
        of_weights: values of those of the weights alone that earlier trials have found; this one adds its own.
        weights: which a user's own measures must leave as they are.

    Raises:
        UndefinedMeasureError: for a measure that was asked for by name.
        FlatminimaError: if a user's own changes the weights.
    """
    values, undefined = {}, {}
    with differentiating(trial.model):
        for measure in selection.measures:
            own = measure.name not in CATALOGUE
            with weights.left_by(measure.name, trial.model) if own else nullcontext():
                try:
                    values[measure.name] = of_weights[measure.name] if measure.name in of_weights else measure.of(trial)
                except UndefinedMeasureError as error:
                    if measure.name in selection.by_name:
                        raise UndefinedMeasureError(f"{measure.name} is not defined here: {error}") from None
                    undefined[measure.name] = str(error)
    of_weights.update({m.name: values[m.name] for m in selection.measures if m.cost == "weights" and m.name in values})
    return values, undefined


def _log_det(prepared: PreparedModel, number: int, factored: FactoredGram) -> LogDeterminant | None:
    """The logarithm of det ξ and its parts; None where ξ is singular and that is to be skipped."""
    try:
        return log_determinant_parts(factored, prepared.rows.names(prepared.subsets[number]))
    except RankDeficientError as error:
        if prepared.options.on_singular == "skip":
            return None
        if prepared.constant_outputs:
            raise RankDeficientError(
                f"trial {number}: the network returns the same outputs for different samples, so that their gradients "
                "are linearly dependent: look for dead units, a broken checkpoint, or inputs of the wrong scale"
            ) from None
        raise RankDeficientError(
            f"trial {number}: {error}; or pass on_singular='skip' to leave such trials out"
        ) from None


def _share(factored: FactoredGram, unit: Tensor, samples: int) -> ShareValues:
    """Of a parameter whose part of ξ is ``unit``, but for the scale."""
    part = dataclasses.replace(factored, unit=unit, shares=None)
    rank = numerical_rank(part)
    log_det = log_determinant(part) if rank == len(unit) else math.nan
    return ShareValues(part.matrix().trace().item() / samples, log_det, rank)
