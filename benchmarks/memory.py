"""ξ of large networks within a memory budget: peak memory against the plan, and the time it took.

    python benchmarks/memory.py                        # about half an hour on two cores
    python benchmarks/memory.py --cases resnet50

Every case runs in a process of its own that may allocate its budget, the network and its data, and what Python and
PyTorch take, and nothing more. No peer is timed beside it: none of them fits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import harness
from flatminima.gramian import factored_gram, log_determinant, plan_for
from flatminima.losses import CrossEntropy
from flatminima.network import Inputs
from gram import NETWORKS

OVERHEAD_GIB = 1.5
"""Python, PyTorch, the allocator's arenas, and working space of the kernels."""


class Wide(nn.Module):
    """One layer whose rows for a hundred samples exceed any budget here, over 16 positions a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4096, 32768)
        self.head = nn.Linear(32768, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 16, 4096) → (N, 10)."""
        logits: Tensor = self.head(self.wide(x).relu().mean(1))
        return logits


def network(name: str, samples: int) -> tuple[nn.Module, Inputs, Tensor]:
    """A network of ``gram.py``, with its data."""
    model, x, y, _ = NETWORKS[name].make(samples)
    return model, x, y


def wide(samples: int) -> tuple[nn.Module, Inputs, Tensor]:
    """The wide layer, with its data."""
    torch.manual_seed(0)
    return Wide(), torch.randn(samples, 16, 4096), torch.arange(samples) % 10


@dataclass(frozen=True)
class Case:
    """A network, N' samples and a budget in GiB."""

    make: Callable[[int], tuple[nn.Module, Inputs, Tensor]]
    budget: float
    samples: int = 100
    loss: Any = "cross_entropy"


CASES = {
    "resnet50": Case(lambda n: network("resnet50", n), 8.0),
    "gpt2": Case(lambda n: network("gpt2", n), 14.0, loss=CrossEntropy(next_token=True)),
    "wide": Case(wide, 2.0),
}


def run(name: str, budget: float) -> dict[str, Any]:
    """One case in this process."""
    case = CASES[name]
    model, x, y = case.make(case.samples)
    plan = plan_for(model, x, memory_budget=int(budget * 2**30))
    print(f"{name}: {plan}", flush=True)
    results: list[Any] = []
    started = time.perf_counter()
    peak = harness.peak_memory(
        lambda: results.append(factored_gram(model, x, y, loss=case.loss, plan=plan, spot_check=True))
    )
    seconds = time.perf_counter() - started
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": case.samples,
        "rows_bytes": sum(p.numel() for p in model.parameters()) * case.samples * 4,
        "budget_bytes": plan.budget,
        "plan": str(plan),
        "passes": len(plan.passes),
        "planned_bytes": plan.activation_bytes + plan.rows_bytes,
        "peak_bytes": peak,
        "seconds": seconds,
        "log_det": log_determinant(results[0]),
    }


def process_limit(name: str, budget: float) -> float:
    """GiB that a case's process may allocate."""
    model = 4 * sum(p.numel() for p in CASES[name].make(1)[0].parameters()) / 2**30
    return budget + 2 * model + OVERHEAD_GIB  # twice: a gradient of the spot check is as large as the network


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--budget", type=float, help="GiB (default: each case's)")
    options = harness.parse(parser)
    record: dict[str, Any] = {"environment": harness.environment(options), "cases": {}}
    table = Table()
    for heading in ("network", "parameters", "J would take", "budget", "passes", "planned", "peak", "seconds"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name in options.cases:
        budget = options.budget or CASES[name].budget
        limits = {**harness.limits(options), "memory_limit": process_limit(name, budget)}
        found = record["cases"][name] = harness.in_own_process(run, name, budget, **limits)
        if "error" in found:
            table.add_row(name, found["error"])
        else:
            sizes = [found[key] for key in ("rows_bytes", "budget_bytes", "planned_bytes", "peak_bytes")]
            rows, allowed, planned, peak = (f"{size / 2**30:.2f} GiB" for size in sizes)
            count, passes = f"{found['parameters']:,}", str(found["passes"])
            table.add_row(name, count, rows, allowed, passes, planned, peak, f"{found['seconds']:.0f}")
        path = harness.write_json(options.output or "memory", record)
    Console(width=130).print(table)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
