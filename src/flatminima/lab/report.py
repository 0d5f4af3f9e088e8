"""Figures and one self-contained HTML page: no script, no font, no picture is loaded from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter


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
        axes.yaxis.set_minor_formatter(NullFormatter())


def write_page(path: Path, template: str, **context: Any) -> None:
    """Render one of the package's templates and write the page atomically."""
    environment = Environment(
        loader=PackageLoader("flatminima.lab", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(environment.get_template(template).render(context), encoding="utf-8")
    partial.replace(path)
