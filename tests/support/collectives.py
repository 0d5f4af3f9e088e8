"""Several processes: run until all have ended, and what they exchange, counted by torch's own names."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from support.commands import METHOD, server


@contextmanager
def counted_collectives() -> Iterator[dict[str, int]]:
    """How often this process takes part in which collective operation; filled on exit."""
    counts: dict[str, int] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield counts
    counts |= {event.key: event.count for event in profile.key_averages() if event.key.startswith("c10d::")}


def run_in_processes(function: Callable[..., None], processes: int, *args: Any, within: float = 240.0) -> None:
    """Run ``function(rank, *args)`` in so many processes; fail if they have not ended within so many seconds."""
    server()
    context = torch.multiprocessing.start_processes(function, args, nprocs=processes, join=False, start_method=METHOD)
    deadline = time.monotonic() + within
    while not context.join(timeout=max(0.1, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"the processes have not ended within {within} s: they wait for each other")


def free_port() -> int:
    """A port where nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
