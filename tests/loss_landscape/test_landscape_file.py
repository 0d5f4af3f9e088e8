"""A landscape that goes on after an interruption, and the files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima import landscape
from flatminima.errors import FlatminimaError
from flatminima.loss_landscape.directions import eigenvectors
from flatminima.losses import CrossEntropy
from support.landscapes import network


@pytest.mark.parametrize("change", ["weights", "grid", "seed", "data"])
def test_a_file_of_another_landscape_is_refused(data: tuple[Tensor, Tensor], tmp_path: Path, change: str) -> None:
    path = tmp_path / "landscape.json"
    landscape(network(), data, steps=3, path=path, progress=False)
    changed: dict[str, Any] = {"grid": {"extent": 2.0}, "seed": {"seed": 1}}.get(change, {})
    model = network(1 if change == "weights" else 0)
    data = (data[0] + 1, data[1]) if change == "data" else data
    with pytest.raises(FlatminimaError, match="holds another landscape"):
        landscape(model, data, path=path, progress=False, **({"steps": 3} | changed))


@pytest.mark.parametrize("change", ["loss", "one label"])
def test_another_loss_and_another_label_are_refused_where_the_minimum_has_the_same_loss(
    data: tuple[Tensor, Tensor], tmp_path: Path, change: str
) -> None:
    model, path = network(), tmp_path / "landscape.json"
    with torch.no_grad():
        for parameter in model[4].parameters():  # type: ignore[index]
            parameter.zero_()
    options: dict[str, Any] = {"directions": "between", "to": network(1), "steps": 5, "progress": False}
    found = landscape(model, data, path=path, **options)
    labels = data[1].clone()
    if change == "loss":
        options["loss"] = CrossEntropy(label_smoothing=0.1)
    else:
        labels[-1] = 0
    other = landscape(model, (data[0], labels), **options)
    assert other.losses[1] == pytest.approx(found.losses[1], rel=1e-12)
    assert other.losses[3] != pytest.approx(found.losses[3], rel=1e-4)
    with pytest.raises(FlatminimaError, match="holds another landscape"):
        landscape(model, (data[0], labels), path=path, **options)


FACTOR = 1.0
"""Of a loss, which its code does not hold."""


def test_a_function_of_the_same_name_that_computes_something_else_is_refused(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(logits: Tensor, targets: Tensor) -> Tensor:
        return FACTOR * F.cross_entropy(logits, targets, reduction="none")

    options: dict[str, Any] = {"loss": scaled, "steps": 3, "path": tmp_path / "landscape.json", "progress": False}
    found = landscape(network(), data, **options)
    monkeypatch.setitem(globals(), "FACTOR", 1 + 1e-6)
    assert landscape(network(), data, **options) == found  # as another device might round
    monkeypatch.setitem(globals(), "FACTOR", 1.001)
    with pytest.raises(FlatminimaError, match="holds another landscape"):
        landscape(network(), data, **options)


def test_a_function_that_encloses_another_value_is_refused(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    def options(factor: float) -> dict[str, Any]:
        def scaled(logits: Tensor, targets: Tensor) -> Tensor:
            return factor * F.cross_entropy(logits, targets, reduction="none")

        return {"loss": scaled, "steps": 3, "path": tmp_path / "landscape.json", "progress": False}

    found = landscape(network(), data, **options(1.0))
    assert landscape(network(), data, **options(1.0)) == found
    with pytest.raises(FlatminimaError, match="holds another landscape"):
        landscape(network(), data, **options(1 + 1e-6))


def test_a_landscape_along_the_hessian_goes_on_with_its_own_eigenvectors(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = network(), tmp_path / "landscape.json"
    options: dict[str, Any] = {"directions": "hessian", "steps": 3, "extent": 0.5, "progress": False}
    whole = landscape(model, data, path=path, **options)
    values = json.loads(path.read_text())
    values["losses"], values["accuracies"] = values["losses"][:1], values["accuracies"][:1]
    path.write_text(json.dumps(values))  # as an interrupted call leaves it
    of_this_call = eigenvectors

    def turned(*args: Any) -> Any:  # an eigenvector has no sign
        found, ways = of_this_call(*args)
        return found, [{name: -along for name, along in way.items()} for way in ways]

    monkeypatch.setattr("flatminima.loss_landscape.evaluation.eigenvectors", turned)
    assert landscape(model, data, **options).losses == pytest.approx(whole.losses[::-1], rel=1e-6)
    assert landscape(model, data, path=path, **options) == whole
    path.write_text(json.dumps(values))
    beside = tmp_path / "landscape.json.directions"
    beside.write_bytes(beside.read_bytes()[:-9])
    with pytest.raises(FlatminimaError, match=r"json.directions, the eigenvectors of .*remove .*json to begin anew"):
        landscape(model, data, path=path, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no landscape that was begun: .*choose another path, or remove it"),
        (b'{"fingerprint": "a", "los', "is no landscape that was begun"),
        (b'{"losses": [1, 2]}', "is no landscape that was begun: it lacks 'directions'"),
        (b"[]", "is no landscape that was begun"),
        (b"\xff\xfe\x00", "is no landscape that was begun"),
        (
            b'{"digest": "a", "losses": [1, 2], "accuracies": []}',
            r"begun by flatminima 0\.2\.0, which goes on with it; choose",
        ),
    ],
)
def test_a_file_of_something_else_is_refused_and_left(
    data: tuple[Tensor, Tensor], tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "landscape.json"
    path.write_bytes(content)
    with pytest.raises(FlatminimaError, match=message):
        landscape(network(), data, path=path, progress=False)
    assert path.read_bytes() == content


def test_places_that_hold_no_file_are_refused_before_the_points(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "cannot keep a landscape in .*: Is a directory; name another file"),
        (tmp_path / "file" / "landscape.json", "Not a directory; name another file"),
        (tmp_path / ("a" * 300), "File name too long; name another file"),
    ):
        with pytest.raises(FlatminimaError, match=message):
            landscape(network(), data, path=path, progress=False)
