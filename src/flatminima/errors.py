"""What flatminima refuses, and what it warns of: every message says what, where and what to do.

Errors derive from :class:`FlatminimaError` (itself a ``ValueError``), warnings from :class:`FlatminimaWarning`, so that
a caller can catch or silence them by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class FlatminimaError(ValueError):
    """Bad input or an undefined result. The message says what is wrong, where, and what to do."""


class FlatminimaWarning(UserWarning):
    """A result that is right but may not mean what its reader thinks."""


class NonFiniteError(FlatminimaError):
    """NaN or infinity in weights, logits, losses or gradients."""


class RankDeficientError(FlatminimaError):
    """ξ = JJᵀ is singular: ln det ξ is −∞. The message names the samples (duplicates, zero gradients) and the rank."""


class WrongGradientError(FlatminimaError):
    """The spot check found rows of J that differ from plain autograd: samples interact, or their order is not kept."""


class GenericPathWarning(FlatminimaWarning):
    """Some parameters have no layer rule; their gradients are formed one sample at a time: exact, but slower."""


class NotAMinimumWarning(FlatminimaWarning):
    """The training loss is too high to call this a minimum; the measures are defined at minima only."""


class UnequalLossWarning(FlatminimaWarning):
    """Compared models differ in training loss, which confounds γ̂."""


class SingularTrialWarning(FlatminimaWarning):
    """Trials with a singular ξ were left out of ln det ξ, as asked for."""


class ShuffledLoaderWarning(FlatminimaWarning):
    """A loader's own order or sampler was ignored; subsets are drawn by index from its data set."""


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
        raise type(error)(f"{name}: {error}") from error


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the model's name before our errors and warnings."""
    with recorded_warnings() as recorded, naming_errors(name):
        yield
    for warning in recorded:
        warnings.warn(f"{name}: {warning}", type(warning), stacklevel=4)
