"""``compare`` of several models on several cores: all cores on one model after the other, or each core on its own.

    python benchmarks/compare.py --threads 2      # on a quiet machine: other work falls on the ways unequally
    python benchmarks/compare.py --networks cnn --rounds 3

Every way compares the same models, in workers that have compared once before, so that no way pays for its start. The
ways take turns; a way's gain is the first one's time over its own, round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

import flatminima
import harness
from flatminima.lab.networks import build_model

AFTER = "one after the other"
Models = Mapping[str, nn.Module]
Compare = Callable[..., dict[str, tuple[float, ...]]]
"""γ̂ of every trial by model, of models."""


def models_of(network: str, count: int) -> Models:
    """Networks that differ in their random weights."""
    models = {}
    for seed in range(count):
        torch.manual_seed(seed)
        models[name_of(seed)] = build_model(network)
        models[name_of(seed)].train()(torch.randn(100, 3, 32, 32))  # BatchNorm's statistics
    return models


def name_of(seed: int) -> str:
    """That of the network with these random weights."""
    return f"seed {seed}"


def shares_of(models: Models, count: int) -> list[Models]:
    """The models dealt out."""
    names = list(models)
    return [{name: models[name] for name in names[share::count]} for share in range(count)]


def all_of(compare: Compare, models: Models, rank: int, size: int) -> dict[str, tuple[float, ...]]:
    """Of all models."""
    return compare(models)


def share_of(compare: Compare, models: Models, rank: int, size: int) -> dict[str, tuple[float, ...]]:
    """Of one process's share of the models."""
    return compare(shares_of(models, size)[rank])


def trials_of(compare: Compare, models: Models, rank: int, size: int) -> dict[str, tuple[float, ...]]:
    """Of all models, the trials split over the processes."""
    return compare(models, distributed=True)


def shares_in_threads(compare: Compare, models: Models, rank: int, size: int) -> dict[str, tuple[float, ...]]:
    """Of all shares, each in a thread."""
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=lambda: torch.set_num_threads(1)) as pool:
        found = pool.map(compare, shares_of(models, cores))
        return dict(itertools.chain.from_iterable(one.items() for one in found))


@dataclass(frozen=True)
class Way:
    """What each process does, and whether there is one a core, of one thread each, or one with all."""

    function: Callable[[Compare, Models, int, int], dict[str, tuple[float, ...]]]
    process_a_core: bool


WAYS = {
    AFTER: Way(all_of, process_a_core=False),
    "a process for each share": Way(share_of, process_a_core=True),
    "a process for each share of the trials (distributed=True)": Way(trials_of, process_a_core=True),
    "a thread for each share": Way(shares_in_threads, process_a_core=False),
}


def work(connection: Connection, way: str, rank: int, size: int, options: argparse.Namespace, network: str) -> None:
    """Compare whenever asked, in one of ``size`` processes."""
    torch.set_num_threads(1 if WAYS[way].process_a_core else options.threads)
    meeting = f"file://{options.meeting}/{network}-{list(WAYS).index(way)}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    models = models_of(network, options.models)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.images, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (options.images,), generator=generator)

    def compare(models: Models, **how: Any) -> dict[str, tuple[float, ...]]:
        settings = {"subset_size": options.subset_size, "trials": options.trials, "on_singular": "skip", **how}
        found = flatminima.compare(models, (x, y), progress=False, **settings)
        return {name: tuple(one.log_det_fisher.per_trial) for name, one in found.characterizations.items()}

    with harness.warnings_ignored(), contextlib.suppress(EOFError):
        while True:
            connection.send(WAYS[way].function(compare, models, rank, size))
            connection.recv()


class Workers:
    """Processes that compare at the same time, each time they are called; they have done so once."""

    def __init__(self, way: str, network: str, options: argparse.Namespace) -> None:
        context, size = get_context("spawn"), options.threads if WAYS[way].process_a_core else 1
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, way, rank, size, options, network), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        self.found = self._received()

    def _received(self) -> dict[str, tuple[float, ...]]:
        return {name: values for connection in self._connections for name, values in connection.recv().items()}

    def __call__(self) -> None:
        """Compare once more."""
        for connection in self._connections:
            connection.send(None)
        self.found = self._received()

    def stop(self) -> None:
        """No more."""
        for process in self._processes:
            process.kill()
            process.join()


def gains_of(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way, and its gain."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for way in WAYS:
            workers[way] = Workers(way, network, options)
            stack.callback(workers[way].stop)
        seconds = harness.interleaved(workers, options.rounds, options.clock)
    return {
        way: {
            "seconds": harness.summary(seconds[way]),
            "ratio": harness.ratios(seconds[AFTER], seconds[way]),
            "largest_difference": max(
                abs(a - b)
                for name, values in one.found.items()
                for a, b in zip(values, workers[AFTER].found[name], strict=True)
            ),
        }
        for way, one in workers.items()
    }


def show(console: Console, network: str, gains: dict[str, Any], options: argparse.Namespace) -> None:
    """Print one network's table."""
    table = Table(title=f"{network}: {options.models} models compared on {options.threads} cores")
    for heading in ("way", "seconds", "gain: median", "min – max", "γ̂ differs by"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way, one in gains.items():
        gain = one["ratio"]
        spread = f"{gain['min']:.2f} – {gain['max']:.2f}"
        differ = f"{one['largest_difference']:.1g}"
        table.add_row(way, f"{one['seconds']['median']:.1f}", f"{gain['median']:.2f}", spread, differ)
    console.print(table)


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet8", "resnet20", "cnn"])
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--subset-size", type=int, default=50)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = harness.parse(parser)
    console = Console(width=120)
    record: dict[str, Any] = {
        "environment": harness.environment(options),
        "models": [name_of(seed) for seed in range(options.models)],
        "cores": options.threads,
        **{name: getattr(options, name) for name in ("images", "subset_size", "trials", "rounds")},
        "networks": {},
    }
    with tempfile.TemporaryDirectory() as meeting:
        options.meeting = Path(meeting)
        for network in options.networks:
            record["networks"][network] = gains_of(network, options)
            show(console, network, record["networks"][network], options)
            path = harness.write_json(options.output or "compare", record)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
