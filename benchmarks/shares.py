"""Where the time of one ξ goes, by kind of operation, as PyTorch's profiler sees it.

    python benchmarks/shares.py --threads 1
    python benchmarks/shares.py --networks resnet50 vit-s --threads 1

The profiler's own time falls on short operations, so that the shares of copies and hooks are upper bounds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import harness
from gram import NETWORKS, ours

CONVOLUTIONS, PRODUCTS, NORMALIZATION = "convolutions", "products of matrices", "normalization"
COPIES, HOOKS, OTHERS = "copies", "hooks and autograd", "others"
KINDS = (CONVOLUTIONS, PRODUCTS, NORMALIZATION, COPIES, HOOKS, OTHERS)
OPERATIONS = {
    CONVOLUTIONS: ("convolution",),
    PRODUCTS: ("::bmm", "::mm", "::addmm", "::baddbmm", "linear_pointwise"),
    NORMALIZATION: ("_norm",),
    COPIES: ("::copy_", "::clone", "::cat"),
}


def kind_of(operation: str) -> str:
    """Of an operation by the profiler's name for it; what is not the tensor library's own is Python in hooks."""
    if not operation.startswith(("aten::", "mkldnn::")):
        return HOOKS
    return next((kind for kind, parts in OPERATIONS.items() if any(part in operation for part in parts)), OTHERS)


def shares(network: str, repetitions: int) -> dict[str, Any]:
    """Of the time of ξ, by kind, over some calls."""
    model, x, y, loss = NETWORKS[network].make()
    gram_of = ours(model, loss)
    gram_of(x, y)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repetitions):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            gram_of(x, y)
        seconds: Counter[str] = Counter()
        for event in profiler.key_averages():
            seconds[kind_of(event.key)] += event.self_cpu_time_total
        for kind in KINDS:
            found[kind].append(seconds[kind] / sum(seconds.values()))
    return {kind: harness.summary(values) for kind, values in found.items()}


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["cnn", "resnet20", "wrn28-2"])
    options = harness.parse(parser)
    record: dict[str, Any] = {"environment": harness.environment(options), "networks": {}}
    table = Table(title="Shares of ξ's time")
    table.add_column("network")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for network in options.networks:
        found = harness.in_own_process(shares, network, options.repetitions, **harness.limits(options))
        record["networks"][network] = found
        cells = (f"{100 * found[kind]['median']:.0f} %" for kind in KINDS) if "error" not in found else [found["error"]]
        table.add_row(network, *cells)
        path = harness.write_json(options.output or "shares", record)
    console = Console(width=120)
    console.print(table)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
