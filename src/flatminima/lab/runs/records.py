"""What a run notes down: epochs, the resume point, progress, the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from flatminima.lab.schema import RECORD, Count


@dataclass(frozen=True, config=RECORD)
class EpochRecord:
    """One line of ``history.jsonl``."""

    epoch: Count
    """Counted from 1."""
    iteration: Count
    """Updates made when the epoch ended."""
    lr: float
    """Learning rate of the epoch's last update."""
    train_loss: float
    """Mean loss of the epoch's mini-batches, as trained: augmented, smoothed, each at its own weights."""
    train_accuracy: float
    """Fraction of the mini-batches' images classified rightly, likewise."""
    fisher_trace: float | None
    """Mean over the updates with a penalty of mean_i ‖g_i‖², its trace estimate (Sec. 6); None without such updates."""
    test_error: float | None
    """Fraction of test images classified wrongly at the epoch's end, in evaluation mode; None if not evaluated."""
    seconds: float
    """Wall-clock time of the epoch, over all its sittings."""
    validation_error: float | None = None
    """Fraction of the held-out images classified wrongly, likewise; None without such."""
    fit: float | None = None
    """Mean cross entropy of the un-augmented training set in evaluation mode, of runs that stop by it."""


@dataclass(config=RECORD)
class EpochSums:
    """The unfinished epoch: what its record will be the mean of."""

    loss: float = 0.0
    """Sum of the mini-batch losses."""
    correct: Count = 0
    """Images classified rightly."""
    trace: float = 0.0
    """Sum of the regularizer's trace estimates."""
    penalized: Count = 0
    """Updates with a penalty."""
    seconds: float = 0.0
    """Wall-clock time."""


@dataclass(frozen=True, config=RECORD)
class RunResult:
    """How a finished run ended. Loss and accuracy are those of the un-augmented training set in evaluation mode."""

    folder: Path
    """The run folder."""
    epochs: Count
    """Epochs begun; the last may be cut short by a limit in iterations."""
    iterations: Count
    """Updates made."""
    train_loss: float
    """Mean cross entropy (nats, no label smoothing) over the whole training set, confusion set included."""
    train_accuracy: float
    """Fraction of the training set classified rightly, confusion set included."""
    test_error: float
    """Fraction of the test set classified wrongly."""
    seconds: float
    """Wall-clock time of training, over all sittings."""
    data_digest: str
    """Digest of the training and test images and labels."""
    environment: Mapping[str, str | int | bool]
    """Versions, device and threads."""
    validation_error: float | None = None
    """Fraction of the held-out training images classified wrongly; None without such."""


@dataclass(frozen=True, config=RECORD)
class CheckpointNote:
    """What a checkpoint holds beside the weights; nothing in one of an earlier version."""

    mean: tuple[float, ...] = ()
    """Of the images trained on, by channel: they are normalized to mean 0."""
    std: tuple[float, ...] = ()
    """Likewise, and to standard deviation 1."""


@dataclass(frozen=True, config=RECORD)
class ResumeNote:
    """What a resume point holds beside tensors."""

    regularizer: Mapping[str, int]
    """The regularizer's counters; empty without one."""
    iteration: Count
    """Updates made."""
    sums: EpochSums
    """The unfinished epoch so far."""
    history: tuple[EpochRecord, ...]
    """The finished epochs."""
    data_digest: str
    """Digest of the data trained on."""
    environment: Mapping[str, str | int | bool]
    """Versions, device and threads."""


@plain_dataclass(frozen=True)
class ResumePoint(ResumeNote):
    """All that a run needs to go on to the same bits: every random draw is a function of (seed, epoch, iteration)."""

    tensors: Mapping[str, Tensor]
    """Weights, buffers and the optimizer's state, by name."""


@dataclass(frozen=True, config=RECORD)
class RunProgress:
    """How far a run in progress is: what a live view shows of it."""

    doing: Literal["training", "measuring"]
    """Training, or measuring the minimum."""
    iteration: Count = 0
    """Updates made."""
    iterations: Count = 0
    """Updates in all."""
    epoch: Count = 0
    """The present one, counted from 1."""
    epochs: Count = 0
    """How many there will be."""
    loss: float | None = None
    """Mean mini-batch loss of the last finished epoch, if there is one."""

    @property
    def fraction(self) -> float:
        """How much of the training is done."""
        if self.doing == "measuring":
            return 1.0
        return self.iteration / self.iterations if self.iterations else 0.0


@dataclass(frozen=True, config=RECORD)
class RunFailure:
    """Why a run failed."""

    error: str
    """The message, in one line."""
