"""What only training runs raise and warn of; errors and warnings of the library are in :mod:`flatminima.errors`."""

from __future__ import annotations

from flatminima.errors import FlatminimaError, FlatminimaWarning


class DamagedFileError(FlatminimaError):
    """A file of a run is truncated, altered or not what its name says; what was trained can be trained again."""


class NoPartsError(FlatminimaError):
    """A part was asked for of data that have none."""


class UnreachedLossError(FlatminimaError):
    """A run came to its limit without fitting its training set as well as it was to; it would again."""


class DamagedRunWarning(FlatminimaWarning):
    """Part of a run folder was unusable and has been thrown away; the run goes on from what was whole."""


class UnkeptMeasuresWarning(FlatminimaWarning):
    """What was measured of a run is not kept, as its folder cannot be written to."""


class AdaptedCheckpointWarning(FlatminimaWarning):
    """A checkpoint was not loaded as it is: names were shortened, tensors left out, or numbers rounded."""


class GuessedNormalizationWarning(FlatminimaWarning):
    """How a network's training normalized its images was not said, and was guessed by the training loss."""


class UnlikeClassesWarning(FlatminimaWarning):
    """A network has more outputs than its data have classes: they may be numbered in another way."""


class ChangedCodeWarning(FlatminimaWarning):
    """The code of a user's own network is not what it was when the network was trained."""


class ResumedElsewhereWarning(FlatminimaWarning):
    """A run goes on in another environment than it began in: it is valid, but its bits are not reproducible."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run between two updates, with its resume point saved; the message says how to go on.

    It is no error, and ``except Exception`` around one run of many must not swallow it.
    """


class TrainingStopped(Exception):  # noqa: N818
    """The caller of a run stopped it at the end of an epoch, with its resume point saved; asked again, it goes on."""
