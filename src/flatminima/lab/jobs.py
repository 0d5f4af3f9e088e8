"""Where runs go: this process, worker processes on this machine, or a Ray cluster.

An executor performs every task, whatever becomes of the others. A task whose worker dies is performed again, so tasks
should take up what they left and find again what they finished, as :func:`flatminima.lab.runs.training.train` does.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Any, Protocol, TextIO, TypeVar

import torch

from flatminima.errors import FlatminimaError, FlatminimaWarning, described
from flatminima.lab.heap import keep_freed_memory
from flatminima.progress import track

Task = TypeVar("Task")

Result = TypeVar("Result")

PRELOADED = ["flatminima.lab.experiments", "lightning_fabric", "sklearn.datasets", "sklearn.model_selection"]
"""What the server has imported before it forks a worker; Fabric takes longer than all else, and every run needs it."""

_GRACE_SECONDS = 20.0  # what a worker that is told to stop gets for its present update and its resume point


@dataclass(frozen=True)
class Failure:
    """What stands in the place of a task's result if there is none."""

    task: Any
    """The task."""
    error: str
    """What went wrong, in one line."""


class Executor(Protocol):
    """Where tasks are performed."""

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Generator[tuple[int, Result | Failure], None, None]:
        """Perform ``function(task)`` for every task; yield each one's number and outcome as it ends.

        Closing the generator, or Ctrl-C, stops what is running.
        """
        ...


@dataclass(frozen=True)
class Local:
    """This process, one task after another, with the threads it has."""

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Generator[tuple[int, Result | Failure], None, None]:
        """See :meth:`Executor.run`."""
        for number, task in enumerate(tasks):
            yield number, _attempt(function, task)


@dataclass(frozen=True)
class WorkerPool:
    """Worker processes on this machine; with several GPUs each worker sees one of them, dealt out in turn.

    A run's bits may depend on the number of threads, but not on the number of workers.
    """

    workers: int
    """Tasks at once; more than one may share a GPU."""
    threads: int = 1
    """Threads of each worker."""
    retries: int = 2
    """How often a task is performed again whose worker was killed (say, for memory)."""

    def prepare(self) -> None:
        """Begin with the imports, where a server does them, while this process does something else."""
        _context()

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Generator[tuple[int, Result | Failure], None, None]:
        """See :meth:`Executor.run`."""
        waiting, deaths = deque(range(len(tasks))), Counter[int]()
        gpus = _visible_gpus()
        slots = [_Slot(function, self.threads, gpus[i % len(gpus)] if gpus else None) for i in range(self.workers)]
        try:
            while True:
                for slot in slots:
                    if slot.number is None and waiting:
                        number = waiting.popleft()
                        slot.give(number, tasks[number])
                busy = {slot.connection: slot for slot in slots if slot.number is not None}
                if not busy:
                    return
                for connection in wait(list(busy)):
                    slot = busy[connection]
                    number, outcome = slot.take()
                    if isinstance(outcome, _Death):
                        deaths[number] += 1
                        if deaths[number] <= self.retries:
                            waiting.appendleft(number)
                            continue
                        outcome = Failure(tasks[number], f"its worker died {deaths[number]} times, {outcome.how}")
                    yield number, outcome
        finally:
            _stop([slot.process for slot in slots if slot.process is not None])


@dataclass(frozen=True)
class Ray:
    """A Ray cluster (extra ``cluster``); run folders must be on a path that all its nodes share.

    Ray performs a task again, on another node, when its node or its worker dies.
    """

    address: str | None = None
    """The cluster's address, or "auto" (None: that of RAY_ADDRESS, else a cluster of this machine alone)."""
    threads: int = 1
    """Cores reserved for a task, and its threads."""
    gpus: float = 0.0
    """GPUs reserved for a task; several tasks can share one (0.25: four of them)."""
    retries: int = 3
    """How often a task is performed again whose worker or node died."""

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Generator[tuple[int, Result | Failure], None, None]:
        """See :meth:`Executor.run`.

        Raises:
            FlatminimaError: Ray is not installed, or there is no cluster at the address.
        """
        if not tasks:
            return
        try:
            import ray
        except ModuleNotFoundError:
            raise FlatminimaError("a Ray cluster needs ray: pip install 'flatminima[cluster]'") from None
        _require_listener(self.address)
        was_connected = ray.is_initialized()
        try:
            ray.init(address=self.address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise FlatminimaError(f"there is no Ray cluster at {self.address}: {described(error)}") from None
        remote: Any = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=self.retries)(_attempt_remotely)
        running = {remote.remote(function, task, self.threads): number for number, task in enumerate(tasks)}
        try:
            while running:
                (ended,), _ = ray.wait(list(running), num_returns=1)
                number = running.pop(ended)
                try:
                    outcome = ray.get(ended)
                except ray.exceptions.RayError as error:
                    outcome = Failure(tasks[number], described(error))
                yield number, outcome
        finally:
            for reference in running:
                ray.cancel(reference)  # raises KeyboardInterrupt there
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_GRACE_SECONDS)
            if not was_connected:
                ray.shutdown()


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    executor: Executor,
    *,
    description: str = "runs",
    progress: bool = True,
) -> list[Result | Failure]:
    """Perform every task; the outcomes in the tasks' order, a :class:`Failure` where there is no result.

    Args:
        function: importable from its module (it crosses a process boundary).
        tasks: one argument each; picklable.
        executor: where.
        description: what the progress bar says.
        progress: show a bar with the time left on a terminal.
    """
    with contextlib.closing(executor.run(function, tasks)) as ended:
        outcomes = dict(track(ended, description, progress, total=len(tasks)))
    return [outcomes[number] for number in range(len(tasks))]


def _attempt(function: Callable[[Task], Result], task: Task) -> Result | Failure:
    try:
        return function(task)
    except Exception as error:
        if os.environ.get("FLATMINIMA_DEBUG"):
            traceback.print_exc()
        return Failure(task, described(error))


def _attempt_remotely(function: Callable[[Task], Result], task: Task, threads: int) -> Result | Failure:
    torch.set_num_threads(threads)
    return _attempt(function, task)


def _require_listener(address: str | None) -> None:
    """Refuse a HOST:PORT where nobody listens: Ray would try for minutes, and then end the process."""
    host, _, port = (address or "").rpartition(":")
    if "/" in host or not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise FlatminimaError(f"there is no Ray cluster at {address}: {described(error)}") from None


def _visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class _Death:
    how: str


class _Slot:
    """A worker process, started when first needed and again when it has died, and the number of its task."""

    def __init__(self, function: Callable[[Any], Any], threads: int, gpu: str | None) -> None:
        self._arguments = (function, threads, gpu)
        self.process: Any = None
        self.number: int | None = None

    def give(self, number: int, task: Any) -> None:
        if self.process is None:
            context = _context()
            self.connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
            try:
                process.start()
                self.process = process
            except BaseException:  # Ctrl-C: a worker that starts all the same finds its connection at an end
                self.connection.close()
                raise
            finally:
                theirs.close()  # so that the worker's end is the only one, and its death the end of the connection
        self.number = number
        with contextlib.suppress(OSError):  # it died meanwhile: `take` will see it
            self.connection.send(task)

    def take(self) -> tuple[int, Any]:
        """The task's number and its outcome, or a :class:`_Death`."""
        number, self.number = self.number, None
        assert number is not None
        try:
            return number, self.connection.recv()
        except (EOFError, OSError):
            self.connection.close()
            self.process.join()
            code, self.process = self.process.exitcode, None
            return number, _Death(f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}")


def _context() -> Any:
    """How workers are started: where that is safe, forked from a server that has done the slow imports once."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *_main_module()])
    # Ctrl-C goes to the server too, which would end in a traceback while it still imports: it inherits that not.
    # The tracker must be there before, since its start lets SIGINT through again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return context


def _main_module() -> list[str]:
    """The program, which every worker imports again: a script as "__main__"; of what ``-m`` runs, ours alone by name.

    Another program's module may begin its work when it is imported, which multiprocessing forbids for "__main__" only.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return ["__main__"]
    return [spec.name] if spec.name == "flatminima.__main__" else []


def _serve(connection: Any, function: Callable[[Any], Any], threads: int, gpu: str | None) -> None:
    """A worker's life: tasks until the connection ends, or the parent does.

    Ctrl-C is the parent's to handle; it stops a worker by SIGTERM, which interrupts a task as Ctrl-C would.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.showwarning = _show_warning
    keep_freed_memory()
    torch.set_num_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            task = connection.recv()
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            outcome = _attempt(function, task)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            connection.send(outcome)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours in one line, as the command line shows them; others as Python does."""
    if issubclass(category, FlatminimaWarning):
        sys.stderr.write(f"flatminima: warning: {message}\n")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _stop(processes: Sequence[Any]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
