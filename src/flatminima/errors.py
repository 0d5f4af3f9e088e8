"""What flatminima refuses, and what it warns of: every message says what, where and what to do.

Errors derive from :class:`FlatminimaError` (itself a ``ValueError``), warnings from :class:`FlatminimaWarning`, so that
a caller can catch or silence them by name.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NOT_THE_USERS = frozenset({"flatminima", "torch", "contextlib"})
"""Packages whose calls may lie between a user's line and a warning of ours."""


class FlatminimaError(ValueError):
    """Bad input or an undefined result. The message says what is wrong, where, and what to do."""


class FlatminimaWarning(UserWarning):
    """A result that is right but may not mean what its reader thinks."""


class NonFiniteError(FlatminimaError):
    """NaN or infinity in weights, logits, losses or gradients."""


class RankDeficientError(FlatminimaError):
    """ξ = JJᵀ is singular: ln det ξ is −∞. The message names the samples (duplicates, zero gradients) and the rank."""


class UndefinedMeasureError(FlatminimaError):
    """A measure is not defined for this model, these data or this loss. The message says why."""


class WrongGradientError(FlatminimaError):
    """The spot check found rows of J that differ from plain autograd: samples interact, or their order is not kept."""


class GenericPathWarning(FlatminimaWarning):
    """Some parameters have no layer rule; their gradients are formed one sample at a time: exact, but slower."""


class UnusedParametersWarning(FlatminimaWarning):
    """Trainable parameters act in training mode but not in eval mode, where measures are taken, and count as zero."""


class NotAMinimumWarning(FlatminimaWarning):
    """The training loss is too high to call this a minimum; the measures are defined at minima only."""


class UnshiftedLabelsWarning(FlatminimaWarning):
    """Labels per position equal the inputs, and the loss does not ask for the next token."""


class NotLogitsWarning(FlatminimaWarning):
    """Outputs look like probabilities, where the loss takes logits."""


class UnlikeModelsWarning(FlatminimaWarning):
    """Compared models have different numbers of parameters, between which γ̂ says little."""


class UnequalLossWarning(FlatminimaWarning):
    """Compared models differ in training loss, which confounds γ̂."""


class ImpreciseWarning(FlatminimaWarning):
    """The trials were not enough for the standard error that was asked for."""


class SingularTrialWarning(FlatminimaWarning):
    """Trials with a singular ξ were left out of ln det ξ, as asked for."""


class UntrackedEpochWarning(FlatminimaWarning):
    """A network could not be measured as it was at the end of an epoch; training goes on."""


class ShuffledLoaderWarning(FlatminimaWarning):
    """A loader's own order or sampler was ignored; subsets are drawn by index from its data set."""


class UnrepeatableForwardWarning(FlatminimaWarning):
    """Two passes at the same weights gave different losses, so a penalty formed of their difference is noise."""


class CoarseRoundingWarning(FlatminimaWarning):
    """Part of the forward pass is in half precision or quantized, too coarse for a finite difference."""


class IdlePenaltyWarning(FlatminimaWarning):
    """The penalty's gradient is so much smaller than the main one that the regularizer does nothing."""


class NotTrainingWarning(FlatminimaWarning):
    """Settings for a training are asked for a model in eval mode, which computes something else than in training."""


class NoisyPenaltyWarning(FlatminimaWarning):
    """The penalty's gradient is mostly rounding error."""


class AccumulationWarning(FlatminimaWarning):
    """Gradients were accumulated over calls that each counted as a step of its own."""


class LedgerWarning(FlatminimaWarning):
    """Rows of a ledger lack what is asked for, or are there twice."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`FlatminimaError` unless the condition holds."""
    if not condition:
        raise FlatminimaError(message)


def require_integer(name: str, value: object) -> None:
    """Raise :class:`FlatminimaError` for an option that is no integer; numpy's are, True and False are not."""
    require(_is_integer(value) and not isinstance(value, bool), f"{name} must be an integer, got {value!r}")


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:  # arrays and tensors have the method, of any shape and type
        return False
    return True


def require_number(name: str, value: object, *, optional: bool = False) -> None:
    """Raise :class:`FlatminimaError` for an option that is no real number; numpy's are, True and False are not."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(number or (optional and value is None), f"{name} must be a number, got {value!r}")


def require_positive(name: str, value: Any, *, or_zero: bool = False) -> None:
    """Raise :class:`FlatminimaError` for an option that is no finite number above (or at) zero."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and is_finite(value)
    what = "zero or a positive number" if or_zero else "a positive number"
    require(number and (value > 0 or (or_zero and value == 0)), f"{name} must be {what}, got {value!r}")


def is_finite(value: numbers.Real) -> bool:
    """Whether a float can hold the number."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def require_seed(value: object) -> None:
    """Raise :class:`FlatminimaError` for a seed that PyTorch's generators do not take."""
    require_integer("seed", value)
    require(-(2**63) <= operator.index(value) < 2**64, f"seed must fit 64 bits, got {value}")  # type: ignore[arg-type]


def require_flag(name: str, value: object) -> None:
    """Raise :class:`FlatminimaError` for an option that is neither True nor False."""
    require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the user's line, however many calls of ours lie between it and this one."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint at the one of ``names`` that was probably meant, to be put behind the wrong one; or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require_one_of(what: str, name: object, names: Collection[str]) -> None:
    """Raise :class:`FlatminimaError` for a name that is none of ``names``, all lower case; hint at the one meant."""
    known = isinstance(name, str) and name in names
    hint = did_you_mean(name.lower(), names) if isinstance(name, str) else ""
    require(known, f"unknown {what} {name!r}{hint}; use one of {', '.join(names)}")


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Say which of our extras to install where a package is missing.

    Raises:
        FlatminimaError: in the place of ``ModuleNotFoundError``; ``what`` is that which needs the package.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        raise FlatminimaError(f"{what} needs {package}: pip install 'flatminima[{extra}]'") from None


def one_line(said: BaseException | str) -> str:
    """A text, or what an error says, in one line; the type's name of an error that says nothing."""
    words = " ".join(_said_by(said).split())
    return words if isinstance(said, str) else words or type(said).__name__


def described(error: BaseException) -> str:
    """What somebody else's error says, in one line, behind its type; ours speak for themselves."""
    words, kind = one_line(error), type(error).__name__
    return words if isinstance(error, FlatminimaError) or words == kind else f"{kind}: {words}"


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that may follow; two lines where the first only announces the second."""
    lines = [line.strip() for line in _said_by(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _said_by(error: BaseException | str) -> str:
    try:
        return str(error)
    except Exception:  # an error of somebody else's may fail at saying what it is
        return ""


@contextmanager
def recorded_warnings() -> Iterator[list[FlatminimaWarning]]:
    """Every warning of ours, withheld from the caller; the others go on."""
    recorded: list[FlatminimaWarning] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FlatminimaWarning)
        yield recorded
    for warning in caught:
        if isinstance(warning.message, FlatminimaWarning):
            recorded.append(warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def naming_errors(name: str) -> Iterator[None]:
    """Put the model's name before our errors, which otherwise do not say whose they are."""
    try:
        yield
    except FlatminimaError as error:
        raise type(error)(_named(name, error)) from error


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the model's name before our errors and warnings."""
    with recorded_warnings() as recorded, naming_errors(name):
        yield
    for warning in recorded:
        warn(_named(name, warning), type(warning))


def _named(name: str, said: Exception) -> str:
    """A message behind the name, which some begin with already."""
    return str(said) if str(said).startswith(f"{name}: ") else f"{name}: {said}"
