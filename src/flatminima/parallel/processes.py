"""The processes that work on one result together, and the few things that they exchange.

A process that fails alone would leave the others waiting in the next exchange. So before each one all meet in the
group's store, where a process that failed has left word instead of coming.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from flatminima.errors import FlatminimaError
from flatminima.launch import rank_and_size
from flatminima.torch_compat import FSDP_GATHERING_FUNCTIONS, process_group_store

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """Some processes, and which of them this one is. Every method but those of a single one is a collective call.

    Attributes:
        rank: this process's number among them.
        size: how many there are.
        group: torch's process group; None for a process on its own.
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
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    @classmethod
    def launched(cls) -> Processes:
        """Those that ``torchrun`` started, whether they have joined yet or not; without it, this process alone."""
        return cls(*rank_and_size()) if dist.is_available() else cls()

    @contextmanager
    def together(self) -> Iterator[None]:
        """An exception in this block on one process is raised on all, and leaves none waiting; they end it together.

        The block may hold more of these methods' calls, and run a model that FSDP2 has split over these processes.
        What it exchanges by other means is not watched: there the others wait as long as the group's timeout allows.
        So they do for a process that is killed, where no launcher (``torchrun``) ends them with it.

        Raises:
            FlatminimaError: where another process failed; names it. In the type of its error if that is one of ours.
        """
        if self.size == 1:
            yield
            return
        meetings = _Meetings.of(self)
        with meetings.announcing_failure(self.group):
            yield
            meetings.meet()

    def attempt(self, action: Callable[[], Result]) -> Result:
        """What ``action()`` returns here; exceptions as in :meth:`together`."""
        with self.together():
            return action()

    def gather(self, action: Callable[[], Result]) -> list[Result]:
        """What ``action()`` returns on every process, by rank; exceptions as in :meth:`together`."""
        own = self.attempt(action)
        if self.size == 1:
            return [own]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, own, group=self.group)
        return gathered

    def first(self, action: Callable[[], Result]) -> Result:
        """What ``action()`` returns on the first process, which alone does it; exceptions as in :meth:`together`."""
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
            _Meetings.of(self).meet()
            dist.all_reduce(tensor, group=self.group)


class _Meetings:
    """Meetings of a group's processes in its store. All hold the same ones, in the same order."""

    _of_group: ClassVar[WeakKeyDictionary[Any, _Meetings]] = WeakKeyDictionary()

    @classmethod
    def of(cls, processes: Processes) -> _Meetings:
        """Those of the processes' group; a collective call the first time."""
        if processes.group not in cls._of_group:
            cls._of_group[processes.group] = cls(processes)
        return cls._of_group[processes.group]

    def __init__(self, processes: Processes) -> None:
        self.rank, self.size = processes.rank, processes.size
        names: list[Any] = [None] * self.size
        dist.all_gather_object(names, uuid.uuid4().hex, group=processes.group)  # the store may hold old groups' keys
        store = process_group_store(processes.group)
        self.store: Any = dist.PrefixStore(f"flatminima/{names[0]}", store)  # type: ignore[attr-defined]
        self.number = 0  # the number of the last meeting
        self.announcing = False
        self.failure_known = False

    def meet(self) -> None:
        """Wait for all processes; raise what one failed with, if it did instead of coming."""
        self.number += 1
        try:
            if self.store.add(f"{self.number}/present", 1) == self.size:
                self.store.set(f"{self.number}/failure", pickle.dumps(None))
                for key in ("present", "failure"):  # all have left the last meeting
                    self.store.delete_key(f"{self.number - 1}/{key}")
            failure = pickle.loads(self.store.get(f"{self.number}/failure"))
        except dist.DistStoreError as error:
            raise FlatminimaError(
                "another process has not come to the exchange within the process group's timeout: see whether it was "
                f"killed, or still computes ({error})"
            ) from error
        if failure is not None:
            self.failure_known = True
            raise failure

    @contextmanager
    def announcing_failure(self, group: Any) -> Iterator[None]:
        """Leave word of an exception at the next meeting, which the others wait at or come to.

        Within another of these nothing is left to do: an exception reaches the outer one before the next meeting.
        """
        if self.announcing:
            yield
            return
        self.announcing, self.failure_known = True, False
        try:
            with self._meeting_before_gathers(group):
                yield
        except BaseException as error:
            if not self.failure_known:
                self.number += 1
                with suppress(dist.DistError):  # the store may have gone down with another process
                    self.store.set(f"{self.number}/failure", pickle.dumps(self._for_others(error)))
            raise
        finally:
            self.announcing = False

    def _for_others(self, error: BaseException) -> FlatminimaError:
        if isinstance(error, FlatminimaError):
            return type(error)(f"process {self.rank}: {error}")
        return FlatminimaError(f"process {self.rank} of {self.size} failed: {type(error).__name__}: {error}")

    @contextmanager
    def _meeting_before_gathers(self, group: Any) -> Iterator[None]:
        """A meeting before FSDP2 gathers weights."""

        def after_meeting(function: Callable[..., Any]) -> Callable[..., Any]:
            def gather(*args: Any, **kwargs: Any) -> Any:
                if kwargs.get("group") is group:
                    self.meet()
                return function(*args, **kwargs)

            return gather

        before = {name: getattr(dist, name) for name in FSDP_GATHERING_FUNCTIONS}
        try:
            for name, function in before.items():
                setattr(dist, name, after_meeting(function))
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)
