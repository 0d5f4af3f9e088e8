from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from flatminima.lab.reports.figures import band, lines


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
