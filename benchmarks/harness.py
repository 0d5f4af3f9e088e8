"""Plumbing that the benchmarks share: interleaved timings, peak memory, jobs in processes of their own, the record."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import multiprocessing
import platform
import re
import resource
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatminima.errors import FlatminimaWarning

RESULTS = Path(__file__).parent / "results"
sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the peers, shared with the tests that check them


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the options that every benchmark has."""
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the process's own time, which other work on the machine hardly touches; only with one thread",
    )
    parser.add_argument("--memory-limit", type=float, default=12.0, help="GiB per process, 0: none (default: 12)")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds per process (default: 1200)")
    parser.add_argument("--output", help="name of the record in benchmarks/results (default: the benchmark's)")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu adds up the threads' times: use it with --threads 1")
    return options


def limits(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`in_own_process` takes, from the command line."""
    return {"threads": options.threads, "memory_limit": options.memory_limit, "timeout": options.timeout}


def clock_of(clock: str, device: str = "cpu") -> Callable[[], float]:
    """The time in seconds, once ``device`` has done what it was given."""

    def now() -> float:
        if device != "cpu":
            torch.accelerator.synchronize()
        return CLOCKS[clock]()

    return now


@contextlib.contextmanager
def warnings_ignored() -> Iterator[None]:
    """Of ours: a network with random weights is no minimum, which matters to no time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatminimaWarning)
        yield


def sharpen(model: nn.Module, factor: float) -> None:
    """Multiply the logits, as training does to fit: the weights and the bias of the last linear layer."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter *= factor


def interleaved(
    functions: Mapping[str, Callable[[], object]], repetitions: int, clock: str, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per call by name, one call of each per round, so that a busy machine slows all of them alike.

    Every other round runs in reverse order. The functions should have run once before. The clock waits for ``device``.
    """
    now = clock_of(clock, device)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for repetition in range(repetitions):
        for name in names if repetition % 2 == 0 else reversed(names):
            start = now()
            functions[name]()
            seconds[name].append(now() - start)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(seconds: list[float], reference: list[float]) -> dict[str, float]:
    """The summary of the ratios, round by round."""
    return summary([a / b for a, b in zip(seconds, reference, strict=True)])


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes by which the process grew at most while ``function`` ran; None where the system cannot tell (not Linux).

    On a CUDA device: by which PyTorch's allocations there grew.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):  # what glibc keeps of earlier calls would hide the growth
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    function()
    return None


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def in_own_process(
    function: Callable[..., dict[str, Any]], *args: Any, threads: int, memory_limit: float, timeout: float
) -> dict[str, Any]:
    """``function(*args)`` in a fresh process, or ``{"error": why not}``: an exception, out of memory, out of time.

    Args:
        function: at a module's top level.
        *args: picklable.
        threads: PyTorch's.
        memory_limit: GiB that the process may allocate; 0 for no limit, as a GPU's driver reserves more than it uses.
        timeout: seconds.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, function, args, threads, memory_limit), daemon=True)
    process.start()
    there.close()
    try:
        result: dict[str, Any] = here.recv() if here.poll(timeout) else {"error": f"took longer than {timeout:.0f} s"}
    except EOFError:
        process.join()
        result = {"error": f"died (exit code {process.exitcode}): out of memory?"}
    process.kill()
    process.join()
    return result


def _run(connection: Connection, function: Callable[..., Any], args: Any, threads: int, memory_limit: float) -> None:
    torch.set_num_threads(threads)
    if memory_limit:
        limit = int(memory_limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        result = function(*args)
    except Exception as error:  # any failure of a peer is a result
        first_line = next(iter(str(error).strip().splitlines()), "")
        message = f"{type(error).__name__}: {first_line}"
        if isinstance(error, MemoryError) or "can't allocate memory" in message or "not enough memory" in message:
            message = f"needs more than {memory_limit:g} GiB"
        result = {"error": message[:200]}
    with contextlib.suppress(BrokenPipeError):  # whoever waited was stopped
        connection.send(result)


def environment(options: argparse.Namespace, device: str = "cpu") -> dict[str, Any]:
    """What the numbers were measured with."""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": options.threads,
        "clock": options.clock,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": _cpu(),
        "system": platform.platform(),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return f"{found[1]} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def write_json(name: str, result: Mapping[str, Any]) -> Path:
    """Write ``results/{name}.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path
