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
from numpy.typing import NDArray

from flatminima.files import write_file

INK, MUTED, LINE = "#010101", "#010102", "#010103"
"""Colours that stand for the page's own, light or dark: of text, of frames and of grids."""

CATEGORIES = ("#010104", "#010105", "#010106")
"""Likewise, of data."""

_VARIABLES = dict(
    zip((INK, MUTED, LINE, *CATEGORIES), ("ink", "muted", "line", "first", "second", "third"), strict=True)
)

MARKERS = ("o", "s", "^")


@dataclass(frozen=True)
class Picture:
    """One figure, and the text that stands for it."""

    title: str
    description: str
    svg: Markup


def picture(
    title: str, description: str, draw: Callable[[Axes], None], size: tuple[float, float] = (4.2, 3.2)
) -> Picture:
    """Draw one pair of axes, ``size`` inches large, as inline SVG in the colours of the page that it is on."""
    style: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "svg.fonttype": "path",
        "svg.hashsalt": "flatminima",  # the same data give the same bytes
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.grid": True,
        "grid.color": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Picture(title, description, Markup(svg[svg.index("<svg") :]))  # matplotlib's own output


def lines(axes: Axes, names: Sequence[str], groups: Mapping[str, Sequence[Sequence[float]]], *, log: bool) -> None:
    """Mean ± standard deviation at every named setting, one line per group."""
    x = np.arange(len(names))
    for (label, values), colour, marker in zip(groups.items(), CATEGORIES, MARKERS, strict=False):
        means, deviations = _means_and_deviations(values)
        axes.errorbar(x, means, deviations, color=colour, marker=marker, capsize=3, label=label, linewidth=1.6)
    axes.set_xticks(x, names)
    axes.legend(frameon=False, fontsize=8)
    if log:
        axes.set_yscale("log")


def band(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]], *, log: bool) -> None:
    """The mean over named settings as a line, ± standard deviation shaded, and every value as a point."""
    x = np.arange(len(names))
    means, deviations = _means_and_deviations(values)
    colour = CATEGORIES[0]
    axes.plot(x, means, color=colour, linewidth=1.6)
    axes.fill_between(x, means - deviations, means + deviations, color=colour, alpha=0.2, linewidth=0)
    for position, single in zip(x, values, strict=True):
        axes.scatter([position] * len(single), single, s=12, color=colour)
    axes.set_xticks(x, names)
    if log:
        axes.set_yscale("log")


def intervals(
    axes: Axes, names: Sequence[str], groups: Mapping[str, Sequence[tuple[float, float, float] | None]]
) -> None:
    """A value with the ends of its interval, or nothing, for every name from top to bottom; one colour per group."""
    for k, ((label, found), colour, marker) in enumerate(zip(groups.items(), CATEGORIES, MARKERS, strict=False)):
        places = [place for place, entry in enumerate(found) if entry is not None]
        values, low, high = np.array([entry for entry in found if entry is not None]).reshape(-1, 3).T
        y = np.array(places) + 0.25 * (k - (len(groups) - 1) / 2)
        axes.hlines(y, low, high, color=colour, linewidth=1.6)
        axes.plot(values, y, color=colour, marker=marker, linestyle="", label=label)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(groups))


def _means_and_deviations(values: Sequence[Sequence[float]]) -> tuple[NDArray[Any], NDArray[Any]]:
    means = np.array([np.mean(v) if len(v) else np.nan for v in values])
    return means, np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])


def write_page(path: Path, template: str, **context: Any) -> None:
    """Render one of the package's templates and write the page atomically."""
    environment = Environment(
        loader=PackageLoader("flatminima.lab.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_file(path, environment.get_template(template).render(context))
