"""A landscape's numbers as JSON and as pictures."""

from __future__ import annotations

import math

import pytest
from torch import Tensor

from flatminima import Landscape, landscape
from flatminima.errors import FlatminimaError
from support.landscapes import network


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"directions": "random", "coordinates": 1}',
        '{"directions": "up", "coordinates": [[0]], "losses": [1], "accuracies": []}',
        '{"directions": "random", "coordinates": [[0]], "losses": [1], "accuracies": [1, 2]}',
        '{"directions": "random", "coordinates": [[0]], "losses": [1, 2], "accuracies": []}',
    ],
)
def test_a_text_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(FlatminimaError, match="not a landscape"):
        Landscape.from_json(text)


def test_a_text_of_a_part_is_refused() -> None:
    text = '{"directions": "random", "coordinates": [[-1, 0, 1]], "losses": [1], "accuracies": []}'
    with pytest.raises(FlatminimaError, match=r"1 losses for 3 grid points; .*same call with the same path goes on"):
        Landscape.from_json(text)


def test_flat_planes_and_negative_losses_have_pictures() -> None:
    axis = (-1.0, 0.0, 1.0)
    Landscape("random", (axis, axis), (2.0,) * 9).plot()
    assert list(Landscape("random", (axis,), (-1.0, -2.0, -1.0)).plot().lines[0].get_ydata()) == [-1, -2, -1]
    with pytest.raises(FlatminimaError, match="a plane is drawn on a logarithmic scale"):
        Landscape("random", (axis, axis), (-1.0,) * 9).plot()


def test_pictures_of_lines_and_planes(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    line = landscape(model, data, steps=3, progress=False)
    assert list(line.plot().lines[0].get_ydata()) == list(line.losses)
    plane = landscape(model, data, directions="between", to=[network(1), network(2)], steps=5, progress=False).plot()
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in plane.lines] == [(0, 0), (1, 0), (0, 1)]
    with pytest.raises(FlatminimaError, match="no loss of this landscape is finite"):
        Landscape("random", ((0.0,),), (math.nan,)).plot()


def test_infinite_losses_are_left_out_of_pictures() -> None:
    axis = (-1.0, 0.0, 1.0)
    text = Landscape("random", (axis,), (1.0, 0.5, 1.0)).to_json().replace("[1.0, 0.5", "[1e999, 0.5")
    (curve,) = [line for line in Landscape.from_json(text).plot().lines if len(line.get_xdata()) == 3]
    assert [math.isnan(value) for value in curve.get_ydata()] == [True, False, False]
    Landscape("random", (axis, axis), (math.inf, *[1.0, 2.0] * 4)).plot()
