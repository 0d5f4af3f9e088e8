"""What: trials split over the processes of a ``torchrun``; every process ends with all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from flatminima.parallel.processes import Processes
from flatminima.progress import track

Trial = TypeVar("Trial")


def perform_trials(
    perform: Callable[[int], Trial],
    trials: int,
    enough: Callable[[Sequence[Trial]], bool],
    *,
    distributed: bool,
    progress: bool,
) -> list[Trial]:
    """``[perform(t) for t in range(trials)]``, cut after the first trial at which ``enough`` says so.

    Distributed, every rank performs every world-size-th trial and they are exchanged round by round, so that the
    result, and where it is cut, are those of a single process. An exception on one rank is raised on all.

    Raises:
        FlatminimaError: if ``distributed`` without an initialized process group.
    """
    processes = Processes.all() if distributed else Processes()
    done: list[Trial] = []
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
