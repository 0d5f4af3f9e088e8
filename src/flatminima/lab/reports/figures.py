"""Figures and one self-contained HTML page: no script, no font, no picture is loaded from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import rich.table
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from flatminima.lab.storage import unwritable, write_whole


@dataclass(frozen=True)
class Theme:
    """Colours of a figure on a light or a dark page."""

    name: str
    ink: str
    muted: str
    grid: str
    categories: tuple[str, ...]
    ramp: tuple[str, ...]


THEMES = (
    Theme(
        "light",
        "#1c2430",
        "#55606e",
        "#dde2e8",
        ("#2461a8", "#b9541a", "#157a58"),
        ("#9cc3ea", "#4f8fcf", "#1f5fa6", "#0c2f5c"),
    ),
    Theme(
        "dark",
        "#e7eaf0",
        "#a3adba",
        "#353d48",
        ("#82b6f0", "#f2a672", "#6fd1af"),
        ("#37618f", "#5b93cf", "#93c1f2", "#d8eaff"),
    ),
)


MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Picture:
    """One figure in both themes, with the text that stands for it."""

    title: str
    description: str
    light: Markup
    dark: Markup


@dataclass(frozen=True)
class Table:
    """Cells of text, with a heading for every column and every row; shown on a terminal, in Markdown and on a page."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __rich__(self) -> rich.table.Table:
        shown = rich.table.Table(title=self.title, title_justify="left")
        for number, heading in enumerate(self.header):
            shown.add_column(heading, justify="left" if number == 0 else "right")
        for row in self.rows:
            shown.add_row(*row)
        return shown

    def markdown(self) -> str:
        """The table with its title above it."""
        lines = [self.header, ("---", *("---:" for _ in self.header[1:])), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n"


def picture(title: str, description: str, draw: Callable[[Axes, Theme], None]) -> Picture:
    """Draw one pair of axes in every theme, as inline SVG."""
    drawn = {}
    for theme in THEMES:
        style: dict[Any, Any] = {
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 10,
            "svg.fonttype": "path",
            "svg.hashsalt": "flatminima",  # the same data give the same bytes
            "text.color": theme.ink,
            "axes.labelcolor": theme.ink,
            "axes.edgecolor": theme.muted,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "axes.grid": True,
            "grid.color": theme.grid,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(4.2, 3.2), layout="constrained")
            axes = figure.add_subplot()
            axes.set_axisbelow(True)
            draw(axes, theme)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue()
        drawn[theme.name] = Markup(svg[svg.index("<svg") :])  # matplotlib's own output
    return Picture(title, description, drawn["light"], drawn["dark"])


def scatter(
    axes: Axes, theme: Theme, groups: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, log: bool
) -> None:
    """Points in ordered groups, from the ramp's first colour to its last."""
    for (label, (x, y)), colour, marker in zip(groups.items(), theme.ramp, MARKERS, strict=False):
        axes.scatter(x, y, s=34, color=colour, marker=marker, label=label, edgecolors=theme.muted, linewidths=0.4)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # labels of minor ticks would overlap


def lines(
    axes: Axes, theme: Theme, x: Sequence[float], groups: Mapping[str, Sequence[Sequence[float]]], *, log: bool = False
) -> None:
    """Mean ± standard deviation at every x, one line per group."""
    for (label, values), colour, marker in zip(groups.items(), theme.categories, MARKERS, strict=False):
        means = [float(np.mean(v)) for v in values]
        deviations = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
        axes.errorbar(x, means, deviations, color=colour, marker=marker, capsize=3, label=label, linewidth=1.6)
    axes.set_xticks(list(x))
    if log:
        axes.set_yscale("log")


def band(axes: Axes, theme: Theme, names: Sequence[str], values: Sequence[Sequence[float]], *, log: bool) -> None:
    """The mean over named settings as a line, ± standard deviation shaded, and every value as a point."""
    x = np.arange(len(names))
    means = np.array([np.mean(v) if len(v) else np.nan for v in values])
    deviations = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
    colour = theme.categories[0]
    axes.plot(x, means, color=colour, linewidth=1.6)
    axes.fill_between(x, means - deviations, means + deviations, color=colour, alpha=0.2, linewidth=0)
    for position, single in zip(x, values, strict=True):
        axes.scatter([position] * len(single), single, s=12, color=colour)
    axes.set_xticks(x, names)
    if log:
        axes.set_yscale("log")


def write_page(path: Path, template: str, **context: Any) -> None:
    """Render one of the package's templates and write the page atomically."""
    environment = Environment(
        loader=PackageLoader("flatminima.lab.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template(template).render(context))


def write_text(path: Path, text: str) -> None:
    """Replace the file as a whole; its folder is made if there is none.

    Raises:
        FlatminimaError: the disk is full, or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
    write_whole(path, text)
