"""Ground: the processes that work on one result together, and the few things that they exchange."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from flatminima.errors import FlatminimaError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """Some processes, and which of them this one is. Every method but those of a single one is a collective call.

    Attributes:
        rank: this process's number among them.
        size: how many there are.
        group: torch's process group; None stands for the default one, and for a process on its own.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def all(cls) -> Processes:
        """Those of the default process group.

        Raises:
            FlatminimaError: if there is none.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise FlatminimaError("distributed=True needs a process group: start with torchrun and init_process_group")
        return cls(dist.get_rank(), dist.get_world_size())

    @classmethod
    def launched(cls) -> Processes:
        """Those that ``torchrun`` started, whether they have joined yet or not; without it, this process alone."""
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    def gather(self, action: Callable[[], Result]) -> list[Result]:
        """What ``action()`` returns on every process, by rank. An exception on one is raised on all."""
        if self.size == 1:
            return [action()]
        own: Result | Exception
        try:
            own = action()
        except Exception as error:
            own = error
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, own, group=self.group)
        for result in gathered:
            if isinstance(result, Exception):
                raise result
        return gathered

    def attempt(self, action: Callable[[], Result]) -> Result:
        """What ``action()`` returns here; an exception on one process is raised on all."""
        own: list[Result] = []
        self.gather(lambda: own.append(action()))
        return own[0]

    def first(self, action: Callable[[], Result]) -> Result:
        """What ``action()`` returns on the first process, which alone performs it. An exception is raised on all."""
        results: list[Any] = self.gather(lambda: action() if self.rank == 0 else None)
        first: Result = results[0]
        return first

    def require_same(self, what: str, value: Callable[[], Any]) -> None:
        """Raise :class:`FlatminimaError` on all processes if ``value()`` differs between them."""
        values = self.gather(value) if self.size > 1 else []
        if any(other != values[0] for other in values):
            raise FlatminimaError(
                f"{what} differ between the processes that share the model's parameters: "
                "give every process the same data, in the same order"
            )

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
