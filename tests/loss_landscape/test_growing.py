"""A landscape that grows: what is done is kept, and not done again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from flatminima import Landscape, landscape
from flatminima.measures import evaluate
from support.landscapes import network

STEPS = 5


def test_an_interrupted_landscape_goes_on(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = network(), tmp_path / "landscape.json"
    whole = landscape(model, data, steps=STEPS, progress=False)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr("flatminima.loss_landscape.evaluation.evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        landscape(model, data, steps=STEPS, path=path, progress=False)
    assert landscape(model, data, steps=STEPS, path=path, progress=False) == whole
    assert calls == 4 + 1 + 2  # the minimum again, which is a point too, and two of five


def test_a_file_that_is_whole_is_a_landscape_and_costs_no_second_one(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "landscape.json"
    whole = landscape(network(), data, steps=3, path=path, progress=False)
    assert Landscape.from_json(path.read_text()) == whole
    for name in ("write_file", "require_writable"):
        fail = f"{name}: nothing is new"
        monkeypatch.setattr(f"flatminima.loss_landscape.landscape_file.{name}", lambda *_, fail=fail: pytest.fail(fail))
    assert landscape(network(), data, steps=3, path=path, progress=False) == whole


@pytest.mark.parametrize(("seconds", "expected"), [(2.0, [None, None, 1, 3, 4]), (0.0, [None] * 5)])
def test_the_file_is_written_after_every_point_that_takes_more_than_a_second(
    data: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    expected: list[int | None],
) -> None:
    path, clock, seen = tmp_path / "landscape.json", itertools.count(0.0, seconds), []
    monkeypatch.setattr("flatminima.loss_landscape.growing.time", SimpleNamespace(monotonic=lambda: next(clock)))

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(len(json.loads(path.read_text())["losses"]) if path.exists() else None)
        return evaluate(*args, **options)

    monkeypatch.setattr("flatminima.loss_landscape.evaluation.evaluate", watched)
    landscape(network(), data, steps=STEPS, path=path, progress=False)
    assert seen == expected  # at the minimum, which is the third point, and before the others
    assert len(json.loads(path.read_text())["losses"]) == STEPS


def test_without_a_file_nothing_is_hashed(data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatminima.loss_landscape.evaluation.fingerprint", lambda *_: pytest.fail("for no file"))
    landscape(network(), data, steps=3, progress=False)
