"""How the learning rate changes in a run: by the iteration and the losses so far alone, so that runs resume exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from flatminima.errors import require
from flatminima.lab.schema import (
    STRICT,
    Above1,
    AtLeastZero,
    Fraction,
    Kinded,
    Positive,
    PositiveFraction,
    kind_of,
    refusing,
)


@refusing("schedule")
@dataclass(frozen=True, config=STRICT)
class MultiStep(Kinded):
    """Multiply the learning rate at fixed points of the run; without milestones it stays constant.

    Milestones are fractions of the run, so that a shortened run keeps the shape of its schedule: the usual "÷10 at
    epochs 100 and 150 of 200", "at 32k and 48k of 64k iterations" and "at 50 % and 75 %" are all ``(0.5, 0.75)``.
    """

    milestones: Annotated[tuple[float, ...], Field(strict=False)] = (0.5, 0.75)
    """Where the learning rate changes, as fractions of the run, increasing; without any it stays constant."""
    factor: Positive = 0.1
    """What the learning rate is multiplied by at every milestone."""

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in zip((0.0, *self.milestones), (*self.milestones, 1.0), strict=True))
        require(increasing, f"schedule.milestones must increase between 0 and 1, got {self.milestones}")

    def multiplier(self, iteration: int, total: int, losses: Sequence[float], fits: Sequence[float]) -> float:
        """The learning rate at ``iteration`` of ``total`` (counted from 0) relative to the initial one."""
        passed = sum(iteration >= round(milestone * total) for milestone in self.milestones)
        return self.factor**passed


@refusing("schedule")
@dataclass(frozen=True, config=STRICT)
class Plateau(Kinded):
    """Multiply the learning rate when the training loss of an epoch stops improving.

    Names and meaning are those of :class:`torch.optim.lr_scheduler.ReduceLROnPlateau` in its relative mode.
    """

    factor: Positive = 0.1
    """What the learning rate is multiplied by on a plateau."""
    patience: AtLeastZero = 10
    """Epochs without improvement that are tolerated; the next one multiplies the learning rate."""
    threshold: Fraction = 1e-4
    """Relative decrease of the training loss below its best that counts as an improvement."""

    def multiplier(self, iteration: int, total: int, losses: Sequence[float], fits: Sequence[float]) -> float:
        """The learning rate after epochs with these training losses, relative to the initial one."""
        best, stale, passed = math.inf, 0, 0
        for loss in losses:
            if loss < best * (1 - self.threshold):
                best, stale = loss, 0
            else:
                stale += 1
            if stale > self.patience:
                passed, stale = passed + 1, 0
        return self.factor**passed


@refusing("schedule")
@dataclass(frozen=True, config=STRICT)
class Approach(Kinded):
    """Multiply the learning rate once the loss that the run stops at is near, so that an epoch does not leap past it.

    Near is what the un-augmented training set's loss says, which ``stop_at_loss`` has computed after every epoch.
    """

    near: Above1 = 10.0
    """At how many times ``stop_at_loss`` the learning rate changes, for good."""
    factor: Positive = 0.2
    """What it is multiplied by."""

    def multiplier(self, iteration: int, total: int, losses: Sequence[float], fits: Sequence[float]) -> float:
        """The learning rate after these ``fits`` (in units of ``stop_at_loss``), relative to the initial one."""
        return self.factor if any(fit <= self.near for fit in fits) else 1.0


@refusing("schedule")
@dataclass(frozen=True, config=STRICT)
class Landing(Kinded):
    """Like :class:`Approach`, with a rate that falls further where another epoch like the last would leap past it.

    For runs that come to one loss at different rates, as under different augmentation: each ends close to it.
    """

    near: Above1 = 10.0
    """At how many times ``stop_at_loss`` the learning rate is first multiplied by ``factor``."""
    factor: Positive = 0.1
    """What it is multiplied by."""
    tolerance: PositiveFraction = 0.05
    """How far below ``stop_at_loss`` the next epoch may end, as a fraction of it, if the loss falls in proportion to
    the learning rate; where the last epoch's fall would take it further, the rate is multiplied by what keeps it."""

    def multiplier(self, iteration: int, total: int, losses: Sequence[float], fits: Sequence[float]) -> float:
        """The learning rate after these ``fits`` (in units of ``stop_at_loss``), relative to the initial one."""
        multiplier, before = 1.0, 0.0  # the fit before, once one was near
        for fit in fits:
            if not before and fit <= self.near:
                multiplier, before = self.factor, fit
            elif before:
                if 1.0 < fit < before:
                    multiplier *= min(1.0, math.log(fit / (1 - self.tolerance)) / math.log(before / fit))
                before = fit
        return multiplier


@refusing("schedule")
@dataclass(frozen=True, config=STRICT)
class OneCycle(Kinded):
    """Raise the learning rate to the run's and lower it to almost nothing, along cosines (Smith & Topin, 2019).

    Names and meaning are those of :class:`torch.optim.lr_scheduler.OneCycleLR`; the momentum does not change. It is a
    function of the iteration alone, so that a run goes on to the same bits.
    """

    pct_start: PositiveFraction = 0.3
    """The fraction of the run in which the learning rate rises."""
    div_factor: Above1 = 25.0
    """What the run's learning rate, which is the highest, is divided by at the beginning."""
    final_div_factor: Above1 = 1e4
    """What the learning rate at the beginning is divided by at the end."""

    def multiplier(self, iteration: int, total: int, losses: Sequence[float], fits: Sequence[float]) -> float:
        """The learning rate at ``iteration`` of ``total`` (counted from 0) relative to the highest."""
        first, top = 1 / self.div_factor, self.pct_start * total - 1
        if iteration < top:
            return _along_cosine(first, 1.0, iteration / top)
        return _along_cosine(1.0, first / self.final_div_factor, (iteration - top) / (total - 1 - top))


def _along_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


Schedule = Annotated[
    Annotated[MultiStep, Tag("MultiStep")]
    | Annotated[Plateau, Tag("Plateau")]
    | Annotated[Approach, Tag("Approach")]
    | Annotated[Landing, Tag("Landing")]
    | Annotated[OneCycle, Tag("OneCycle")],
    Discriminator(kind_of),
]
