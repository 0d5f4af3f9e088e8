"""The trials: ξ of one subset after the other and its values, split over processes where there are several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from flatminima.errors import RankDeficientError
from flatminima.gramian import FactoredGram, factored_gram, log_determinant, numerical_rank
from flatminima.measures.preparation import PreparedModel
from flatminima.measures.robustness import input_jacobian_norms
from flatminima.network import Inputs
from flatminima.parallel import Processes
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
    """One subset's values, each as of the same name in :class:`~flatminima.Characterization`.

    Attributes:
        log_det_fisher: ln det ξ; NaN where ξ is singular and that is to be skipped.
        spectral_radius: the largest eigenvalue of ξ.
        frobenius_norm: mean_i ‖F_i‖_F².
        fisher_frobenius_norm: ‖ξ‖_F² / N'².
        fisher_trace: tr ξ / N'.
        robustness: the mean over the samples it is computed on; NaN where there is none.
        spectrum: eigenvalues of ξ in descending order, on the CPU.
        shares: of every parameter by name, where asked for.
        generic_parameters: parameters without a layer rule.
        dtype: the network's floating-point type.
    """

    log_det_fisher: float
    spectral_radius: float
    frobenius_norm: float
    fisher_frobenius_norm: float
    fisher_trace: float
    robustness: float
    spectrum: Tensor
    shares: dict[str, ShareValues] | None
    generic_parameters: tuple[str, ...]
    dtype: str


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
    for first in track(range(0, trials, processes.size), "measuring", progress and processes.rank == 0):
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
    factored = factored_gram(
        prepared.model,
        *rows.of_batch(inputs, targets),
        loss=rows.loss,
        logit_normalization=options.logit_normalization,
        batchnorm=options.batchnorm,
        scale_invariant=options.scale_invariant,
        shares=options.per_parameter,
        plan=prepared.plan,
        path=options.path,
        checks=prepared.checks,
    )
    robustness = _mean_robustness(prepared, inputs)
    log_det = _log_det(prepared, number, factored)
    xi = factored.matrix()
    spectrum = torch.linalg.eigvalsh(xi).flip(0).clamp_min(0).cpu()
    samples, per_sample = options.subset_size, rows.per_sample
    own = xi.view(samples, per_sample, samples, per_sample).diagonal(dim1=0, dim2=2)  # the samples' blocks
    shares = factored.shares
    return TrialValues(
        log_det_fisher=log_det,
        spectral_radius=spectrum[0].item(),
        frobenius_norm=own.square().sum().item() / samples,
        fisher_frobenius_norm=xi.square().sum().item() / samples**2,
        fisher_trace=xi.trace().item() / samples,
        robustness=robustness,
        spectrum=spectrum,
        shares=None if shares is None else {name: _share(factored, unit, samples) for name, unit in shares.items()},
        generic_parameters=factored.generic_parameters,
        dtype=str(factored.dtype).removeprefix("torch."),
    )


def _mean_robustness(prepared: PreparedModel, inputs: Inputs) -> float:
    """The mean over the samples that it is computed on; NaN where there is none."""
    samples = prepared.robustness_samples
    if not samples or prepared.no_robustness is not None:
        return math.nan
    return input_jacobian_norms(prepared.model, inputs[:samples]).mean().item()


def _log_det(prepared: PreparedModel, number: int, factored: FactoredGram) -> float:
    """The logarithm of det ξ; NaN where ξ is singular and that is to be skipped."""
    try:
        return log_determinant(factored, prepared.rows.names(prepared.subsets[number]))
    except RankDeficientError as error:
        if prepared.options.on_singular == "skip":
            return math.nan
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
