"""What pictures have in common: the width of a column in a paper, and shapes and shades that are good in grey too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure, SubFigure

from flatminima.errors import FlatminimaError
from flatminima.files import require_writable, write_file
from flatminima.palette import INK, SERIES

COLUMN_INCHES = 3.3
"""The width of a column in a paper of two."""

MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":", "-.")

_STYLE: Any = {
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 200,
}

_ROW_INCHES = 0.3
_HALF_A_COLUMN = 18
"""Letters of a legend's entry of which two stand beside each other."""


def drawn(draw: Callable[[Axes], None], rows: float, ax: Axes | None) -> Axes:
    """Draw on ``ax``, or in a new figure with room for so many rows of names beside its frame."""
    if ax is not None:
        draw(ax)
        return ax
    with mpl.rc_context(_STYLE):
        _, axes = plt.subplots(figsize=(COLUMN_INCHES, 0.95 + _ROW_INCHES * rows), layout="constrained")
        draw(axes)
    return axes


def drawn_below(draws: Mapping[str, Callable[[Axes], None]], rows: float) -> Figure:
    """A new figure of one picture below the other, each with its name at its left if they are several."""
    with mpl.rc_context(_STYLE):
        height = (0.95 + _ROW_INCHES * rows) * len(draws)
        figure, axes = plt.subplots(len(draws), figsize=(COLUMN_INCHES, height), layout="constrained", squeeze=False)
        for own, (name, draw) in zip(axes[:, 0], draws.items(), strict=True):
            draw(own)
            if len(draws) > 1:
                own.set_ylabel(name)
    return figure


def require_picture(path: Path) -> None:
    """Ask before long work whether a picture could be written.

    Raises:
        FlatminimaError: Its suffix is no format that matplotlib writes, or the file cannot be written.
    """
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise FlatminimaError(f"cannot write the picture {path}: give it one of the suffixes .{', .'.join(known)}")
    require_writable(path)


def write_picture(figure: Figure | SubFigure, path: Path) -> None:
    """Write a figure in the format of the file's suffix, as a whole.

    Raises:
        FlatminimaError: The disk is full, or the folder cannot be written to.
    """
    content = BytesIO()
    with mpl.rc_context(_STYLE):
        figure.figure.savefig(content, format=path.suffix.lower().removeprefix("."))
    write_file(path, content.getvalue())
    plt.close(figure.figure)


def series_styles() -> Iterator[dict[str, str]]:
    """A colour, a marker and a line for each of several series."""
    for number in itertools.count():
        yield {
            "colour": SERIES[number % len(SERIES)],
            "marker": MARKERS[number % len(MARKERS)],
            "line": LINES[number % len(LINES)],
        }


def legend(axes: Axes, labels: Mapping[int, str] | None = None) -> None:
    """Above the axes, so that it covers nothing; ``labels`` with mathematics in the place of those drawn."""
    widest = max(len(text) for text in axes.get_legend_handles_labels()[1])
    box = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2 if widest <= _HALF_A_COLUMN else 1,
        frameon=False,
        handlelength=1.8,
        columnspacing=1.0,
        borderaxespad=0.2,
    )
    for number, text in enumerate(box.get_texts()):
        text.set_parse_math(number in (labels or {}))
        text.set_text((labels or {}).get(number, text.get_text()))
