"""Results as tables and figures, drawn from the committed records whenever the site is built: no number by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from extensions.tables import BENCHMARK_TABLES, BENCHMARKS, RESULTS, origin_of, rankings_table, summaries_of
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flatminima.lab.experiments import Summary
from flatminima.lab.reports import failure_lines, figures, progress_line, tables
from flatminima.pages.drawing import Picture
from flatminima.tables import markdown_text


def grid_of(pictures: Sequence[Picture]) -> nodes.raw:
    """Figures side by side, in the colours of the page."""
    shown = "".join(
        f"<figure><figcaption>{escape(p.title)}</figcaption>"
        f'<div role="img" aria-label="{escape(p.description)}">{p.svg}</div></figure>'
        for p in pictures
    )
    return nodes.raw("", f'<div class="pictures">{shown}</div>', format="html")


def section_of(folder: str, summary: Summary) -> str:
    """An experiment's section as Markdown: question, findings, figures, tables."""
    findings = [f"* {markdown_text(line)}" for line in (*summary.verdict, *failure_lines(summary))]
    drawn = f"```{{figures}} {folder} {summary.name} {' '.join(summary.drawn)}\n```\n" if summary.drawn else ""
    return "\n".join(
        [
            f"## {markdown_text(summary.title)}\n",
            f"{markdown_text(summary.question)}\n",
            *findings,
            f"\n{progress_line(summary)}\n",
            drawn,
            *(table.markdown() for table in tables(summary)),
        ]
    )


class _OfRecords(SphinxDirective):
    """What all of these have in common: the page is built again where a record changes."""

    optional_arguments = 40
    option_spec: ClassVar[dict[str, Any]] = {}

    def markdown(self, text: str) -> list[nodes.Node]:
        """Its nodes."""
        return self.parse_text_to_nodes(text, allow_section_headings=True)

    def note(self, *folders: str) -> None:
        """Depend on the records in folders of results, and on what shows them."""
        for source in Path(__file__).parent.glob("*.py"):
            self.env.note_dependency(str(source))
        for folder in folders:
            for file in sorted((RESULTS / folder).glob("*.json")):
                self.env.note_dependency(str(file))


class Record(_OfRecords):
    """``{record} small``: all experiments of results/small."""

    def run(self) -> list[nodes.Node]:
        """A section each."""
        (folder,) = self.arguments
        self.note(folder)
        return self.markdown("\n".join(section_of(folder, summary) for summary in summaries_of(folder)))


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

    def run(self) -> list[nodes.Node]:
        """One table."""
        file, table = BENCHMARK_TABLES[self.arguments[0]]
        self.note()
        self.env.note_dependency(str(BENCHMARKS / file))
        return self.markdown(f"{table().markdown()}\n{origin_of(file)}\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    for name, directive in {"record": Record, "figures": Figures, "rankings": Rankings, "benchmark": Benchmark}.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
