"""Pictures in a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation

from flatminima.palette import INK, LINE, MUTED, VARIABLES


@dataclass(frozen=True)
class Picture:
    """One figure, and the text that stands for it."""

    title: str
    description: str
    svg: Markup


def picture(
    title: str, description: str, draw: Callable[[Axes], object], size: tuple[float, float] = (4.2, 3.2)
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
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.grid": True,
        "grid.color": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.fontsize": 8,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(_PlainPowers())
                axis.set_minor_formatter(_PlainPowers(minor_thresholds=(1, 0.4)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Picture(title, description, Markup(svg[svg.index("<svg") :]))  # matplotlib's own output


class _PlainPowers(LogFormatterSciNotation):
    """Powers of ten in letters: in a picture whose dollars are dollars, matplotlib's own would show their source."""

    def __call__(self, value: float, position: int | None = None) -> str:
        text = re.sub(r"\$|\\mathdefault|[{}]", "", super().__call__(value, position)).replace(r"\times", "·")
        number, _, power = text.partition("^")
        return number + power.translate(_SUPERSCRIPTS)


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
