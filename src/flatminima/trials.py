"""What: trials split over the processes of a ``torchrun``; every process ends with all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from flatminima.errors import FlatminimaError
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
    rank, world = _rank_and_world() if distributed else (0, 1)
    done: list[Trial] = []
    for first in track(range(0, trials, world), "measuring", progress and rank == 0):
        done += _round(perform, range(first, min(first + world, trials)), rank, world)
        for count in range(max(1, len(done) - world + 1), len(done) + 1):
            if enough(done[:count]):
                return done[:count]
    return done


def _round(perform: Callable[[int], Trial], numbers: range, rank: int, world: int) -> list[Trial]:
    """One trial per rank, exchanged."""
    if world == 1:
        return [perform(numbers[0])]
    own: Trial | BaseException | None = None
    if rank < len(numbers):
        try:
            own = perform(numbers[rank])
        except Exception as error:
            own = error
    gathered: list[Trial | BaseException | None] = [None] * world
    dist.all_gather_object(gathered, own)
    results: list[Trial] = []
    for result in gathered[: len(numbers)]:
        if isinstance(result, BaseException):
            raise result
        assert result is not None
        results.append(result)
    return results


def _rank_and_world() -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        raise FlatminimaError("distributed=True needs a process group: start with torchrun and init_process_group")
    return dist.get_rank(), dist.get_world_size()
