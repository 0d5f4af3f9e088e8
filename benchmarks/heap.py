"""What it gives to keep freed memory for the next tensors, as the command line and workers do, on a CPU with glibc.

    python benchmarks/heap.py --threads 1 --clock cpu      # on a busy machine
    python benchmarks/heap.py --networks resnet20 --repetitions 3

The peer is the C library as it is, which gives large blocks back to the system. Each time is that of a fresh process,
after a first call; the two take turns, and a ratio is one's time over that of the other in the same turn.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import flatminima
import harness
from flatminima.lab.heap import keep_freed_memory
from flatminima.lab.networks import build_model
from flatminima.lab.runs import RunSpec
from training import Ours, images

KEPT, AS_IT_IS = "kept", "as it is"


def training(network: str) -> Callable[[], object]:
    """An epoch of 1,024 images in batches of 64."""
    return Ours(RunSpec(model=network, batch_size=64), images(1024), torch.device("cpu")).epoch


def measuring(network: str) -> Callable[[], object]:
    """A call of ``measure`` on subsets of 100 samples."""
    torch.manual_seed(0)
    model, data = build_model(network).eval(), images(200)
    samples = data.normalize(data.images), data.labels
    return lambda: flatminima.measure(model, samples, trials=4, progress=False)


TASKS = {"training": training, "measuring": measuring}


def cost(task: str, network: str, heap: str, clock: str) -> dict[str, Any]:
    """Seconds of a call, its page faults, and the process's peak memory."""
    if heap == KEPT:
        keep_freed_memory()
    with harness.warnings_ignored():
        call = TASKS[task](network)
        call()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = harness.interleaved({task: call}, 1, clock)[task][0]
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "faults": used.ru_minflt - faults, "peak_bytes": 1024 * used.ru_maxrss}


def compared(task: str, network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both heaps, in turn; the first that fails is the result."""
    found: dict[str, list[dict[str, Any]]] = {KEPT: [], AS_IT_IS: []}
    for repetition in range(options.repetitions):
        for heap in found if repetition % 2 == 0 else reversed(found):
            one = harness.in_own_process(cost, task, network, heap, options.clock, **harness.limits(options))
            if "error" in one:
                return one
            found[heap].append(one)
    seconds = {heap: [one["seconds"] for one in costs] for heap, costs in found.items()}
    return {
        heap: {
            "seconds": harness.summary(seconds[heap]),
            "ratio": harness.ratios(seconds[heap], seconds[AS_IT_IS]),
            "faults": harness.summary([one["faults"] for one in costs]),
            "peak_bytes": max(one["peak_bytes"] for one in costs),
        }
        for heap, costs in found.items()
    }


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet8-wide", "resnet20"])
    options = harness.parse(parser)
    if sys.platform != "linux":
        parser.error("there is nothing to compare: freed memory is kept on Linux alone")
    table = Table(title="Time as a ratio to the C library's heap as it is")
    for heading in ("network", "task", "median", "min – max", "page faults", "as it is", "peak MiB", "as it is"):
        table.add_column(heading, justify="left" if heading in ("network", "task") else "right")
    record: dict[str, Any] = {"environment": harness.environment(options), "networks": {}}
    for network in options.networks:
        record["networks"][network] = {}
        for task in TASKS:
            found = record["networks"][network][task] = compared(task, network, options)
            path = harness.write_json(options.output or "heap", record)
            if "error" in found:
                table.add_row(network, task, found["error"])
                continue
            kept, as_it_is = found[KEPT], found[AS_IT_IS]
            ratio = kept["ratio"]
            counts = (f"{one['faults']['median']:,.0f}" for one in (kept, as_it_is))
            peaks = (f"{one['peak_bytes'] / 2**20:,.0f}" for one in (kept, as_it_is))
            spread = f"{ratio['min']:.2f} – {ratio['max']:.2f}"
            table.add_row(network, task, f"{ratio['median']:.2f}", spread, *counts, *peaks)
    console = Console(width=120)
    console.print(table)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
