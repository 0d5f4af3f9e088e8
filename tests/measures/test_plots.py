"""What is drawn, read back from the axes."""

from __future__ import annotations

import sys
from collections import OrderedDict

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.palette import PARTS, SERIES, VARIABLES
from support.results import TRIALS, characterization, comparison

ODD = "a$b$ [/] _x^2"


def three() -> fm.Comparison:
    return comparison(
        **{
            "plain": characterization(-600, 250, draw=1, shares=True),
            ODD: characterization(-610, 200, draw=2, shares=True),
            "third": characterization(-580, 260, draw=3, shares=True),
        }
    )


def rows_of(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_the_parts_are_stacked_from_zero_and_their_sum_is_gamma() -> None:
    both = three()
    axes = both.plot()
    stacks = [[(bar.get_x(), bar.get_width()) for bar in container] for container in axes.containers[:3]]
    for row, c in enumerate(both.characterizations.values()):
        (start, residual), (right, sensitivity), (left, diversity) = (stack[row] for stack in stacks)
        assert (start, right) == (0, 0)
        assert left == pytest.approx(residual)
        assert residual + sensitivity + diversity == pytest.approx(c.log_det_fisher.mean)
        assert axes.lines[0].get_xdata()[row] == c.log_det_fisher.mean
    assert [name.split("\n")[0] for name in rows_of(axes)] == list(both)
    assert str(both["plain"].log_det_fisher).replace("-", "−") in rows_of(axes)[0]


def test_trials_are_points_around_their_mean() -> None:
    both = three()
    axes = both.plot("trials", measure="fisher_trace")
    points, mean = axes.lines[0], axes.lines[1]
    assert len(points.get_xdata()) == TRIALS
    assert sorted(points.get_xdata()) == sorted(both["plain"].fisher_trace.per_trial)
    assert mean.get_xdata()[0] == both["plain"].fisher_trace.mean
    assert axes.get_xlabel() == "trace of the Fisher"


def test_differences_are_to_the_reference_with_their_intervals() -> None:
    both = three()
    axes = both.plot("differences", measure="log_det_fisher")
    assert both.reference == ODD
    assert axes.get_xlabel() == f"difference to {ODD}\n(95 % intervals)"
    assert rows_of(axes) == ["plain", "third"]
    difference = both.difference("plain", ODD)
    bars = axes.collections[0].get_segments()
    assert bars[0][:, 0] == pytest.approx(difference.interval())
    assert len(both.plot("differences").containers) == 2  # at unit residuals too


def test_shares_are_of_modules_in_the_models_order() -> None:
    axes = three().plot("shares")
    assert rows_of(axes) == ["body.0", "body.1", "head"]
    assert axes.lines[0].get_xdata().tolist() == [75, 12.5, 12.5]
    with pytest.raises(FlatminimaError, match="per_parameter=True"):
        characterization().plot("shares")


def test_a_single_minimum_has_every_picture_but_differences() -> None:
    c = characterization(shares=True)
    for kind in ("parts", "trials", "spectrum", "shares"):
        axes = c.plot(kind)
        assert axes.figure.get_figwidth() == 3.3
        axes.figure.canvas.draw()
    assert c.plot("spectrum").lines[0].get_ydata() == pytest.approx(c.spectrum)
    with pytest.raises(FlatminimaError, match="unknown kind of picture 'differences'"):
        c.plot("differences")  # type: ignore[arg-type]
    with pytest.raises(FlatminimaError, match=r"unknown kind of picture 'spektrum'.*did you mean 'spectrum'"):
        c.plot("spektrum")  # type: ignore[arg-type]
    with pytest.raises(FlatminimaError, match="no measure 'margin'"):
        c.plot("trials", measure="margin")


@pytest.mark.parametrize("kind", ["parts", "trials", "spectrum", "shares", "differences"])
def test_names_are_text_and_nothing_lies_outside_of_the_picture(kind: str) -> None:
    axes = three().plot(kind)  # type: ignore[arg-type]
    figure = axes.figure
    figure.canvas.draw()
    box, whole = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.02
    assert box.x1 <= whole[0] + 0.02
    assert box.y1 <= whole[1] + 0.02


def test_ones_own_axes_are_drawn_on_and_no_figure_is_opened() -> None:
    axes = Figure().add_subplot()
    assert three().plot("parts", ax=axes) is axes
    assert plt.get_fignums() == []


def test_shades_differ_in_grey() -> None:
    def grey(colour: str) -> float:
        return float(np.dot(mpl.colors.to_rgb(colour), (0.299, 0.587, 0.114)))

    for colours in (PARTS, SERIES):
        shades = sorted(map(grey, colours))
        assert min(np.diff(shades)) > 0.06
    assert len(VARIABLES) == 10


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flatminima.measures.plots", raising=False)
    monkeypatch.delitem(sys.modules, "flatminima.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FlatminimaError, match=r"a picture needs matplotlib: pip install 'flatminima\[plot\]'"):
        characterization().plot()


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_shares_are_drawn_at_their_own_modules_where_networks_differ_in_order() -> None:
    def network(*names: str) -> nn.Module:
        return nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names))

    torch.manual_seed(0)
    data = torch.randn(12, 4), torch.arange(12) % 4
    networks = {"a": network("conv", "fc"), "b": network("pre", "conv", "fc")}
    both = fm.compare(networks, data, subset_size=4, trials=2, per_parameter=True, progress=False)
    axes = both.plot("shares")
    rows = rows_of(axes)
    for line, c in zip(axes.lines, both.characterizations.values(), strict=True):
        drawn = {rows[round(row)]: share for share, row in zip(line.get_xdata(), line.get_ydata(), strict=True)}
        assert drawn == pytest.approx({name: 100 * share for name, share in c.shares_by_module(99).items()})
