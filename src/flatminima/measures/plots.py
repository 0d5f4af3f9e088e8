"""Pictures of results, for the width of a column: told apart by shape and shade, so that they are good in grey too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from flatminima.errors import FlatminimaError, did_you_mean, require_one_of
from flatminima.measures.registry import label_of
from flatminima.measures.results import Characterization, Estimate
from flatminima.palette import INK, PAPER, PARTS, SERIES
from flatminima.pictures import MARKERS, drawn, legend, series_styles

if TYPE_CHECKING:  # comparisons draw themselves by these functions
    from flatminima.measures.comparison import Comparison

MODULES = 16
"""Rows of a picture of shares, at most: modules are joined under their parents until they are no more."""


HATCHES = ("////", "", "")
"""Of residual, sensitivity and diversity."""

_KINDS = ("parts", "trials", "spectrum", "shares", "differences")

Minima = Mapping[str, Characterization]


def plotted(minima: Minima, kind: str, measure: str, ax: Axes | None) -> Axes:
    """See :meth:`~flatminima.measures.Characterization.plot`; a single minimum may be called ``""``."""
    require_one_of("kind of picture", kind, _KINDS if len(minima) > 1 else _KINDS[:-1])
    draw, rows = {
        "parts": (lambda axes: draw_parts(axes, minima), len(minima)),
        "trials": (lambda axes: draw_trials(axes, minima, measure), len(minima)),
        "spectrum": (lambda axes: draw_spectrum(axes, minima), 5),
        "shares": (lambda axes: draw_shares(axes, minima), _rows_of_shares(minima) if kind == "shares" else 0),
    }[kind]
    return drawn(draw, rows, ax)


def plotted_differences(comparison: Comparison, measure: str | None, ax: Axes | None) -> Axes:
    """See :meth:`~flatminima.measures.Comparison.plot`."""
    measures = None if measure is None else [measure]
    return drawn(lambda axes: draw_differences(axes, comparison, measures), len(comparison) - 1, ax)


def draw_parts(axes: Axes, minima: Minima) -> None:
    """γ̂ as a bar for every minimum: what lowers it to the left of zero, what raises it to the right, and their sum."""
    names = [name for name, c in minima.items() if c.residual is not None]
    if not names:
        raise FlatminimaError("with batch statistics γ̂ has no parts: measure with batchnorm='eval'")
    left, right = np.zeros(len(names)), np.zeros(len(names))
    for part, colour, hatch in zip(("residual", "sensitivity", "diversity"), PARTS, HATCHES, strict=True):
        values = np.array([getattr(minima[name], part).mean for name in names])
        start = np.where(values < 0, left, right)
        axes.barh(range(len(names)), values, 0.55, start, color=colour, hatch=hatch, edgecolor=INK, lw=0.5, label=part)
        left, right = left + np.minimum(values, 0), right + np.maximum(values, 0)
    gammas = [minima[name].log_det_fisher for name in names]
    axes.errorbar(
        [gamma.mean for gamma in gammas],
        range(len(names)),
        xerr=[_or_zero(gamma.standard_error) for gamma in gammas],
        **_mark("D", INK),
        label="sum",
    )
    axes.axvline(0, color=INK, lw=0.6)
    _name_rows(axes, [_with_value(name, gamma) for name, gamma in zip(names, gammas, strict=True)])
    axes.set_xlabel(r"$\hat{\gamma}$ and its parts (nats)", parse_math=True)
    legend(axes, {3: r"their sum, $\hat{\gamma}$"})


def draw_trials(axes: Axes, minima: Minima, measure: str) -> None:
    """Every trial's value as a point, and the mean with its standard error."""
    estimates = {name: _estimate_of(c, measure) for name, c in minima.items()}
    jitter = np.random.default_rng(0)
    for row, estimate in enumerate(estimates.values()):
        heights = row + jitter.uniform(-0.22, 0.22, len(estimate.per_trial))
        axes.plot(estimate.per_trial, heights, ".", color=SERIES[0], alpha=0.5, ms=4, mew=0)
        axes.errorbar(estimate.mean, row, xerr=_or_zero(estimate.standard_error), **_mark("D", INK))
    _name_rows(axes, [_with_value(name, estimate) for name, estimate in estimates.items()])
    axes.set_xlabel(_label(measure), parse_math=True)


def draw_spectrum(axes: Axes, minima: Minima) -> None:
    """The eigenvalues of ξ, the largest first."""
    for (name, c), style in zip(minima.items(), series_styles(), strict=False):
        ranks = np.arange(1, len(c.spectrum) + 1)
        positive = np.array(c.spectrum) > 0
        axes.semilogy(
            ranks[positive],
            np.array(c.spectrum)[positive],
            style["line"],
            color=style["colour"],
            marker=style["marker"],
            ms=3,
            lw=1,
            markevery=max(len(ranks) // 8, 1),
            label=name,
        )
    axes.set_xlabel("rank of the eigenvalue")
    axes.set_ylabel(r"eigenvalue of $\xi$, mean of trials", parse_math=True)
    if len(minima) > 1:
        legend(axes)


def draw_shares(axes: Axes, minima: Minima) -> None:
    """How much of the Fisher trace lies in which module, in the model's order from top to bottom."""
    shares = {name: c.shares_by_module(MODULES) for name, c in minima.items()}
    modules = list(dict.fromkeys(module for found in shares.values() for module in found))
    offsets = np.linspace(-0.18, 0.18, len(shares)) if len(shares) > 1 else [0.0]
    for (name, found), style, offset in zip(shares.items(), series_styles(), offsets, strict=False):
        rows = np.array([row for row, module in enumerate(modules) if module in found])
        values = 100 * np.array([found[modules[row]] for row in rows])
        axes.hlines(rows + offset, 0, values, color=style["colour"], lw=1.2)
        axes.plot(values, rows + offset, style["marker"], color=style["colour"], ms=3.5, label=name)
    _name_rows(axes, [module or "(the model)" for module in modules])
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the Fisher trace (%)")
    if len(minima) > 1:
        legend(axes)


def draw_differences(axes: Axes, comparison: Comparison, measures: Sequence[str] | None = None) -> None:
    """Paired differences to the reference with 95 % intervals, by one or two measures."""
    reference = comparison.reference
    names = [name for name in comparison if name != reference]
    chosen = measures or ["log_det_fisher", *(["log_det_unit_fisher"] if comparison.has_parts else [])]
    offsets = [0.0] if len(chosen) == 1 else [-0.15, 0.15]
    for measure, offset, colour, marker in zip(chosen, offsets, SERIES, MARKERS, strict=False):
        found = [comparison.difference(name, reference, measure) for name in names]
        means = np.array([estimate.mean for estimate in found])
        ends = np.array([_interval(estimate) for estimate in found]).T
        rows = np.arange(len(names)) + offset
        axes.errorbar(means, rows, xerr=np.abs(ends - means), **_mark(marker, colour), label=_label(measure))
    axes.axvline(0, color=INK, lw=0.8)
    _name_rows(axes, names)
    axes.set_xlabel(f"difference to {reference}\n(95 % intervals)", parse_math=False, loc="right")
    if len(chosen) > 1:
        legend(axes, {number: _label(measure) for number, measure in enumerate(chosen)})
    else:
        axes.set_title(_label(chosen[0]), fontsize="medium", parse_math=True)


def _rows_of_shares(minima: Minima) -> float:
    """As many rows of names as leave every minimum's line a fifth of one."""
    modules = max(len(c.shares_by_module(MODULES)) for c in minima.values())
    return modules * max(0.6, 0.2 * len(minima))


def _interval(estimate: Estimate) -> tuple[float, float]:
    low, high = estimate.interval()
    return (estimate.mean, estimate.mean) if math.isnan(low) else (low, high)


def _estimate_of(c: Characterization, measure: str) -> Estimate:
    estimates = c.estimates()
    if measure not in estimates:
        raise FlatminimaError(
            f"no measure {measure!r}{did_you_mean(measure, estimates)}: choose from {', '.join(estimates)}"
        )
    return estimates[measure]


def _mark(marker: str, colour: str) -> dict[str, Any]:
    """A filled marker with its bar."""
    return {"fmt": marker, "ms": 4, "color": colour, "mec": PAPER, "mew": 0.5, "elinewidth": 1, "capsize": 2}


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """From top to bottom; a name is text, whatever is in it."""
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _label(measure: str) -> str:
    """A measure's name, with its Greek letters as mathematics: few fonts place a hat."""
    text = label_of(measure).strip().replace("$", r"\$")
    return text.replace("γ̂", r"$\hat{\gamma}$").replace("ξ", r"$\xi$")


def _with_value(name: str, estimate: Estimate) -> str:
    value = str(estimate).replace("-", "−")  # as axes have it
    return f"{name}\n{value}" if name else value


def _or_zero(error: float) -> float:
    return 0.0 if math.isnan(error) else error
