"""Results as tables and figures, drawn from the committed records whenever the site is built: no number by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flatminima.lab.experiments import SHORT_NAMES, RankCorrelation, Summary, read_summaries
from flatminima.lab.reports import failure_lines, figures, progress_line, tables
from flatminima.pages.drawing import Picture
from flatminima.tables import Table, markdown_text

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
        (SHORT_NAMES.get(name, name), *(_with_interval(correlations.get(name)) for _, correlations, _ in found))
        for name in measures
    ]
    header = ("measure", *(f"{title} ({count} minima)" for title, _, count in found))
    return Table("Kendall's τ with the test error, over single minima; in brackets 95 % intervals", header, tuple(rows))


def _with_interval(found: RankCorrelation | None) -> str:
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
        _title("Time as a ratio to a forward and backward pass, and peak memory", record),
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
    return Table(_title("Time as a ratio to a plain step, and peak memory", record), ("step", *networks), rows)


def cosines() -> Table:
    """How well the finite difference points where its limit does, at the paper's α."""
    record = json.loads((BENCHMARKS / "finite_differences.json").read_text(encoding="utf-8"))
    rows = tuple(
        (f"{activation}, {stage}", *(f"{_at(points)['cosine']:+.3f}" for points in precisions.values()))
        for stage, activations in record["stages"].items()
        for activation, precisions in activations.items()
    )
    precisions = next(iter(next(iter(record["stages"].values())).values()))
    return Table(_title("Cosine of ∇R with its limit αHg, at α = 1e-4", record), ("network", *precisions), rows)


def _at(points: Sequence[Mapping[str, float]], alpha: float = 1e-4) -> Mapping[str, float]:
    return next(point for point in points if point["alpha"] == alpha)


def _title(title: str, record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    return f"{title} ({environment['command']}; {environment['cpu']}, torch {environment['torch']})"


def grid_of(pictures: Sequence[Picture]) -> nodes.raw:
    """Figures side by side, in the colours of the page."""
    shown = "".join(
        f"<figure><figcaption>{escape(p.title)}</figcaption>"
        f'<div role="img" aria-label="{escape(p.description)}">{p.svg}</div></figure>'
        for p in pictures
    )
    return nodes.raw("", f'<div class="pictures">{shown}</div>', format="html")


class _OfRecords(SphinxDirective):
    """What all of these have in common: the page is built again where a record changes."""

    optional_arguments = 8
    option_spec: ClassVar[dict[str, Any]] = {}

    def markdown(self, text: str) -> list[nodes.Node]:
        """Its nodes."""
        return self.parse_text_to_nodes(text, allow_section_headings=True)

    def note(self, *folders: str) -> None:
        """Depend on the records in folders of results."""
        for folder in folders:
            for file in sorted((RESULTS / folder).glob("*.json")):
                self.env.note_dependency(str(file))


class Record(_OfRecords):
    """``{record} small``: all experiments of results/small."""

    def run(self) -> list[nodes.Node]:
        """A section each."""
        (folder,) = self.arguments
        self.note(folder)
        found: list[nodes.Node] = []
        for summary in summaries_of(folder):
            lines = [*summary.verdict, *failure_lines(summary)]
            text = f"## {markdown_text(summary.title)}\n\n{markdown_text(summary.question)}\n\n"
            text += "\n".join(f"* {markdown_text(line)}" for line in lines) + f"\n\n{progress_line(summary)}\n\n"
            section = self.markdown(text)
            content = section[0] if section and isinstance(section[0], nodes.section) else nodes.container()
            if pictures := figures(summary):
                content += grid_of(pictures)
            for table in tables(summary):
                content += self.markdown(table.markdown())
            found += section
        return found


class Figures(_OfRecords):
    """``{figures} digits-matched scenario-1 residual diversity``: some panels of one experiment."""

    def run(self) -> list[nodes.Node]:
        """One grid."""
        folder, name, *quantities = self.arguments
        self.note(folder)
        summary = next(s for s in summaries_of(folder) if s.name == name)
        return [grid_of(figures(dataclasses.replace(summary, drawn=tuple(quantities))))]


class Rankings(_OfRecords):
    """``{rankings} digits-matched small``: which measures order minima as their test errors do."""

    def run(self) -> list[nodes.Node]:
        """One table."""
        self.note(*self.arguments)
        return self.markdown(rankings_table(self.arguments).markdown())


class Benchmark(_OfRecords):
    """``{benchmark} gram``: a committed benchmark as a table."""

    KNOWN: ClassVar = {
        "gram": ("gram.json", cost_of_gram),
        "regularizer": ("regularizer.json", cost_of_steps),
        "finite-differences": ("finite_differences.json", cosines),
    }

    def run(self) -> list[nodes.Node]:
        """One table."""
        file, table = self.KNOWN[self.arguments[0]]
        self.env.note_dependency(str(BENCHMARKS / file))
        return self.markdown(table().markdown())


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    for name, directive in {"record": Record, "figures": Figures, "rankings": Rankings, "benchmark": Benchmark}.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
