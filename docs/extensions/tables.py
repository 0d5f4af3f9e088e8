"""Tables from the committed records; needs no Sphinx."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatminima.lab.experiments import SHORT_NAMES, RankCorrelation, Summary, read_summaries
from flatminima.tables import Table

ROOT = Path(__file__).parents[2]
RESULTS, BENCHMARKS = ROOT / "results", ROOT / "benchmarks" / "results"
MIB = 2**20
TOLERANCE = 1e-3
"""Results further off than this, relative to the gradients' norms, are said to be."""


def summaries_of(folder: str) -> list[Summary]:
    """All experiments of a folder of results, in the order of their files' names."""
    files = sorted((RESULTS / folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no records in results/{folder}")
    return [summary for file in files for summary in read_summaries(file)]


def rankings_table(folders: Sequence[str]) -> Table:
    """Kendall's τ with the test error over single minima: a measure a row, an experiment a column."""
    found = [
        (f"{folder}: {summary.title}", summary.correlations, len(summary.records))
        for folder in folders
        for summary in summaries_of(folder)
        if summary.correlations
    ]
    measures = list(dict.fromkeys(name for _, correlations, _ in found for name in correlations))
    rows = [
        (SHORT_NAMES.get(name, name), *(with_interval(correlations.get(name)) for _, correlations, _ in found))
        for name in measures
    ]
    header = ("measure", *(f"{title} ({count} minima)" for title, _, count in found))
    return Table("Kendall's τ with the test error, over single minima; in brackets 95 % intervals", header, tuple(rows))


def with_interval(found: RankCorrelation | None) -> str:
    """τ with its interval; a dash where there is none."""
    if found is None or not found.defined:
        return "–"
    return f"{found.tau:+.2f} [{found.low:.2f}, {found.high:.2f}]"


def cost_of_gram() -> Table:
    """Time and peak memory of one ξ beside those of other libraries."""
    record = json.loads((BENCHMARKS / "gram.json").read_text(encoding="utf-8"))
    methods = list(dict.fromkeys(name for network in record["networks"].values() for name in network["methods"]))
    rows = tuple(
        (name, str(network["samples"]), *(_time_and_memory(network["methods"].get(method)) for method in methods))
        for name, network in record["networks"].items()
    )
    return Table(
        "Time as a ratio to a forward and backward pass, and peak memory",
        ("network", "samples", *methods),
        rows,
    )


def _time_and_memory(found: Mapping[str, Any] | None) -> str:
    if found is None or "ratio" not in found:
        return "–"
    wrong = f" (off by {found['relative_error']:.0e})" if found.get("relative_error", 0.0) > TOLERANCE else ""
    return f"{found['ratio']['median']:.2f}, {found['peak_bytes'] / MIB:,.0f} MiB{wrong}"


def cost_of_steps() -> Table:
    """Time and peak memory of one training step."""
    record = json.loads((BENCHMARKS / "regularizer.json").read_text(encoding="utf-8"))
    networks = record["networks"]
    steps = list(dict.fromkeys(step for found in networks.values() for step in found))
    rows = tuple((step, *(_time_and_memory(found.get(step)) for found in networks.values())) for step in steps)
    return Table("Time as a ratio to a plain step, and peak memory", ("step", *networks), rows)


def cosines() -> Table:
    """How well the finite difference points where its limit does, at the paper's α."""
    record = json.loads((BENCHMARKS / "finite_differences.json").read_text(encoding="utf-8"))
    rows = tuple(
        (f"{activation}, {stage}", *(f"{_at(points)['cosine']:+.3f}" for points in precisions.values()))
        for stage, activations in record["stages"].items()
        for activation, precisions in activations.items()
    )
    precisions = next(iter(next(iter(record["stages"].values())).values()))
    return Table("Cosine of ∇R with its limit αHg, at α = 1e-4", ("network", *precisions), rows)


def _at(points: Sequence[Mapping[str, float]], alpha: float = 1e-4) -> Mapping[str, float]:
    return next(point for point in points if point["alpha"] == alpha)


def origin_of(file: str) -> str:
    """What made a benchmark's record, and on what."""
    environment = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))["environment"]
    return f"By `{environment['command']}`, on {environment['cpu']} with torch {environment['torch']}."


BENCHMARK_TABLES = {
    "gram": ("gram.json", cost_of_gram),
    "regularizer": ("regularizer.json", cost_of_steps),
    "finite-differences": ("finite_differences.json", cosines),
}
"""By name: the record and what makes its table."""
