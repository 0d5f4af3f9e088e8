"""Where runs go: worker processes on this machine, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

import torch

from flatminima.progress import track

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    description: str = "runs",
    progress: bool = True,
) -> list[Result]:
    """``[function(task) for task in tasks]`` on ``workers`` processes of one thread each, results in the tasks' order.

    One thread per worker gives every run the same bits however many workers there are. The first failure, or Ctrl-C,
    ends the workers and is raised; tasks that can resume lose nothing.

    Args:
        function: importable from its module (it crosses a process boundary).
        tasks: one argument each; picklable.
        workers: processes at once.
        description: what the progress bar says.
        progress: show a bar with the time left on a terminal.
    """
    results: dict[int, Result] = {}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        futures = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        for future in track(_as_they_end(list(futures)), description, progress, total=len(tasks)):
            results[futures[future]] = future.result()
    except BaseException:
        _stop(pool)
        raise
    pool.shutdown()
    return [results[number] for number in range(len(tasks))]


def _as_they_end(futures: list[Future[Result]]) -> Iterator[Future[Result]]:
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from ended


def _start_worker() -> None:
    """One thread; Ctrl-C is the parent's to handle, which then ends the workers by SIGTERM."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)
