from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from flatminima.lab.reports.figures import band, intervals, lines


@pytest.mark.parametrize("largest", [10.5, 400.0])
@pytest.mark.parametrize("kind", ["band", "lines"])
def test_ticks_of_logarithmic_axes_are_no_formulas(kind: str, largest: float) -> None:
    """Figures show a dollar as a dollar, and so a formula as its source."""
    figure = Figure()
    axes = figure.add_subplot()
    values = [[1.0, 2.0], [5.0, 6.0], [7.0, largest]]
    if kind == "band":
        band(axes, ["a", "b", "c"], values, log=True)
    else:
        lines(axes, ["a", "b", "c"], {"plain": values}, log=True)
    figure.canvas.draw()
    labels = [label.get_text() for label in axes.yaxis.get_ticklabels(which="both")]
    assert [label for label in labels if "$" in label] == []
    assert "10" in labels


def test_every_one_of_many_groups_is_drawn_and_told_apart() -> None:
    names, groups = ["a", "b"], [f"arm {k}" for k in range(7)]
    axes = Figure().add_subplot()
    lines(axes, names, {group: [[float(k), k + 1.0], [k + 2.0]] for k, group in enumerate(groups)}, log=False)
    handles, labels = axes.get_legend_handles_labels()
    drawn = [handle.lines[0] for handle in handles]
    assert labels == groups
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}) == len(groups)
    axes = Figure().add_subplot()
    intervals(axes, names, {group: [(0.1, 0.0, 0.2), (0.3, 0.2, 0.4)] for group in groups})
    handles, labels = axes.get_legend_handles_labels()
    places = [handle.get_ydata() for handle in handles]
    assert labels == groups
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) > 3
    assert max(place[0] for place in places) < min(place[1] for place in places)  # no name's among another's
