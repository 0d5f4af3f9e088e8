"""What experiments draw: settings over a factor, measures with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from flatminima.palette import MUTED, SERIES
from flatminima.pictures import series_styles


def lines(axes: Axes, names: Sequence[str], groups: Mapping[str, Sequence[Sequence[float]]], *, log: bool) -> None:
    """Mean ± standard deviation at every named setting, one line per group."""
    x = np.arange(len(names))
    for (label, values), style in zip(groups.items(), series_styles(), strict=False):
        means, deviations = _means_and_deviations(values)
        axes.errorbar(
            x,
            means,
            deviations,
            color=style["colour"],
            marker=style["marker"],
            linestyle=style["line"],
            capsize=3,
            label=label,
            linewidth=1.6,
        )
    axes.set_xticks(x, names)
    axes.legend(frameon=False, fontsize=8)
    if log:
        _make_logarithmic(axes)


def band(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]], *, log: bool) -> None:
    """The mean over named settings as a line, ± standard deviation shaded, and every value as a point."""
    x = np.arange(len(names))
    means, deviations = _means_and_deviations(values)
    colour = SERIES[0]
    axes.plot(x, means, color=colour, linewidth=1.6)
    axes.fill_between(x, means - deviations, means + deviations, color=colour, alpha=0.2, linewidth=0)
    for position, single in zip(x, values, strict=True):
        axes.scatter([position] * len(single), single, s=12, color=colour)
    axes.set_xticks(x, names)
    if log:
        _make_logarithmic(axes)


def intervals(
    axes: Axes, names: Sequence[str], groups: Mapping[str, Sequence[tuple[float, float, float] | None]]
) -> None:
    """A value with the ends of its interval, or nothing, for every name from top to bottom; one colour per group."""
    apart = min(0.25, 0.8 / max(len(groups), 1))
    for k, ((label, found), style) in enumerate(zip(groups.items(), series_styles(), strict=False)):
        colour = style["colour"]
        places = [place for place, entry in enumerate(found) if entry is not None]
        values, low, high = np.array([entry for entry in found if entry is not None]).reshape(-1, 3).T
        y = np.array(places) + apart * (k - (len(groups) - 1) / 2)
        axes.hlines(y, low, high, color=colour, linewidth=1.6)
        axes.plot(values, y, color=colour, marker=style["marker"], linestyle="", label=label)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(groups))


def _make_logarithmic(axes: Axes) -> None:
    """A logarithmic axis whose ticks are plain text: formulas are text in these figures."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())  # seen where there is hardly a decade


def _means_and_deviations(values: Sequence[Sequence[float]]) -> tuple[NDArray[Any], NDArray[Any]]:
    means = np.array([np.mean(v) if len(v) else np.nan for v in values])
    return means, np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
